"""The exact cost of quantizing one module: the divergence of a model in which nothing else is quantized.

One pass through the model's later blocks per (module, configuration): exact, also where errors are not small, and
costly. So it is measured for a few configurations, and the curve of a cheaper cost carries it to the others.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

MODULE_DIVERGENCE_SCHEMA = TableSchema(
    "module-divergence",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("divergence", pa.float64(), nullable=False),
            pa.field("divergence_stderr", pa.float64()),
        ]
    ),
)
"""`divergence`: mean KL per token in nats; its standard error is over sequences, null for a single one."""

TYPICAL_GROUP_SIZE = 64
MOST_BITS = 4
"""Up to these many bits a configuration per bit width is measured; what 8 bits cost is near 0."""


def default_specs(menu: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    """One configuration per bit width up to 4, of the group size nearest to 64; of an 8-bit menu, the smallest."""
    nearest: dict[int, QuantSpec] = {}
    for spec in sorted(menu, key=lambda spec: (abs(np.log2(spec.group_size / TYPICAL_GROUP_SIZE)), spec)):
        nearest.setdefault(spec.bits, spec)
    few_bits = tuple(spec for bits, spec in sorted(nearest.items()) if bits <= MOST_BITS)
    return few_bits or (min(menu, key=lambda spec: spec.bits_per_weight),)


def standard_error(divergences: Tensor) -> float | None:
    """Standard error of the mean over sequences [sequences]; None for a single one."""
    return float(divergences.std() / len(divergences) ** 0.5) if len(divergences) > 1 else None


def carried_costs(
    measured: np.ndarray, measured_specs: tuple[QuantSpec, ...], cheap: np.ndarray, specs: tuple[QuantSpec, ...]
) -> np.ndarray:
    """Costs [modules, specs]: as measured, or carried from the measured configuration of nearest size.

    `measured` [modules, measured_specs] and `cheap` [modules, specs and measured_specs, in this order]. What was
    not measured is the measured cost times the ratio of the cheap costs, or the measured cost where that has none.
    """
    costs = np.empty((len(measured), len(specs)))
    for column, spec in enumerate(specs):
        distances = [abs(np.log(spec.bits_per_weight / other.bits_per_weight)) for other in measured_specs]
        anchor = int(np.argmin(distances))
        anchor_cheap = cheap[:, len(specs) + anchor]
        ratio = np.divide(cheap[:, column], anchor_cheap, out=np.ones(len(measured)), where=anchor_cheap > 0)
        costs[:, column] = measured[:, anchor] * (1.0 if spec == measured_specs[anchor] else ratio)
    return costs
