"""Delta loss: what the errors of one module's weights do to the loss, to first order, in the quantized model.

|Σ ∂L/∂Ŵ ⊙ (W − Ŵ)| with the gradient at the quantized point: all modules have the configuration that is scored, as in
Intel AutoRound's choice of schemes. A first-order sum: errors of opposite sign cancel in it.
"""

from __future__ import annotations

import pyarrow as pa

from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

DELTA_LOSS_SCHEMA = TableSchema(
    "delta-loss",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("delta_loss", pa.float64(), nullable=False),
        ]
    ),
)
"""`delta_loss` in nats per token."""
