"""Loss-aware cost of quantizing one module: the token-wise Fisher sum.

With y the module's output, y_c its output under configuration c on the same input and g = ∂L/∂y on the
summed calibration loss, the cost is S(m, c) = Σ_tokens (g · (y_c − y))²: the second-order term of the loss
with the empirical Fisher in place of the Hessian, tokens taken as independent. The token-wise sum is kept
exact: replacing it by the product of averaged activation and gradient statistics fails where a few tokens
(the attention sink) carry huge activations and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from torch import Tensor

from lmq.measurement.base import Cost, CostColumn, LayerReplay, Need, Row, cost_row, cost_schema
from lmq.measurement.traces import ModuleTrace
from lmq.numerics import fast_matmul_dtype

FISHER_SCHEMA = cost_schema(
    "fisher",
    1,
    pa.field("fisher", pa.float64()),
)

_TOKENS_AT_ONCE = 2048


def token_fisher(trace: ModuleTrace, error: Tensor) -> float:
    """Σ_tokens (g · (E x))² for the weight error E = Ŵ − W [out_features, in_features].

    The products are taken in the trace's dtype, the sums over outputs in float32 and over tokens in float64.
    """
    transposed = error.to(trace.inputs.dtype).t()
    total = 0.0
    for start in range(0, len(trace.inputs), _TOKENS_AT_ONCE):
        piece = slice(start, start + _TOKENS_AT_ONCE)
        change = (trace.inputs[piece] @ transposed).float()
        loss_change = change.mul_(trace.gradients[piece]).sum(dim=1)
        total += loss_change.double().square_().sum().item()
    return total


def measure_fisher(layer: LayerReplay) -> Iterator[Row]:
    """Token-wise Fisher cost of every module of one layer under every configuration of the menu."""
    for module, trace in layer.traces(fast_matmul_dtype(layer.device)):
        for spec, error in layer.errors(module):
            yield cost_row(module, spec, fisher=token_fisher(trace, error))


FISHER = Cost(
    name="fisher",
    title="Token-wise Fisher",
    schema=FISHER_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.STATES, Need.TEXT_GRADIENTS}),
    settings=("menu",),
    version=2,
    measure=measure_fisher,
    columns=(
        CostColumn(
            name="fisher",
            label="token-wise Fisher",
            column="fisher",
            title="Loss-aware cost, token by token",
            meaning="Sum over the calibration tokens of the squared change of the loss when one module is quantized.",
        ),
    ),
)
