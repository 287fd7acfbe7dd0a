"""Delta loss: what the errors of one module's weights do to the loss, to first order, in the quantized model.

|Σ ∂L/∂Ŵ ⊙ (W − Ŵ)| with the gradient at the quantized point: all modules have the configuration that is scored, as in
Intel AutoRound's choice of schemes. A first-order sum: errors of opposite sign cancel in it.
"""

from __future__ import annotations

import pyarrow as pa

from lmq.measurement.base import Cost, CostColumn, Need, cost_schema

DELTA_LOSS_SCHEMA = cost_schema(
    "delta-loss",
    1,
    pa.field("delta_loss", pa.float64(), nullable=False),
)
"""`delta_loss` in nats per token."""

DELTA_LOSS = Cost(
    name="delta_loss",
    title="Delta loss",
    schema=DELTA_LOSS_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.TOKENS}),
    columns=(
        CostColumn(
            name="delta_loss",
            label="delta loss, gradient at the quantized point",
            column="delta_loss",
            title="Delta loss",
            meaning="First-order change of the loss, with the gradient at the quantized point, in nats per token.",
        ),
    ),
)
