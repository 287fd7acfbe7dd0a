"""Loss-aware cost of quantizing one module: the token-wise Fisher sum.

With y the module's output, y_c its output under configuration c on the same input and g = ∂L/∂y on the
summed calibration loss, the cost is S(m, c) = Σ_tokens (g · (y_c − y))²: the second-order term of the loss
with the empirical Fisher in place of the Hessian, tokens taken as independent. The token-wise sum is kept
exact: replacing it by the product of averaged activation and gradient statistics fails where a few tokens
(the attention sink) carry huge activations and no gradient.
"""

from __future__ import annotations

import pyarrow as pa
from torch import Tensor

from lmq.measurement.traces import ModuleTrace
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

FISHER_SCHEMA = TableSchema(
    "fisher",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("fisher", pa.float64()),
        ]
    ),
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
