"""The exact cost of quantizing one module: the divergence of a model in which nothing else is quantized.

It is exact also where errors are not small, and takes one pass through the model's later blocks per (module,
configuration). So it is measured for a few configurations, and the curve of a cheaper cost carries it to the others
(`carried_costs`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.measurement.base import Cost, CostColumn, LayerReplay, Need, Row, cost_row, cost_schema
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.model.structure import ModuleInfo

MODULE_DIVERGENCE_SCHEMA = cost_schema(
    "module-divergence",
    1,
    pa.field("divergence", pa.float64(), nullable=False),
    pa.field("divergence_stderr", pa.float64()),
)
"""`divergence`: mean KL per token in nats; its standard error is over sequences, null for a single one."""

TYPICAL_GROUP_SIZE = 64
MOST_BITS = 4
"""Up to these many bits a configuration per bit width is measured; what 8 bits cost is near 0."""


def default_specs(menu: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    """One configuration per bit width up to 4, of the group size nearest to 64; of an 8-bit menu, the smallest."""
    nearest: dict[int, QuantSpec] = {}
    few_bits = (spec for spec in menu if spec.bits <= MOST_BITS)
    for spec in sorted(few_bits, key=lambda spec: (abs(np.log2(spec.group_size / TYPICAL_GROUP_SIZE)), spec)):
        nearest.setdefault(spec.bits, spec)
    return tuple(spec for _, spec in sorted(nearest.items())) or (min(menu, key=lambda spec: spec.bits_per_weight),)


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


def measure_divergence(layer: LayerReplay) -> Iterator[Row]:
    """Divergence of the model with one module of a layer quantized, on the first calibration sequences.

    Measured are all modules at every configuration of `specs`, or the `pairs` of a module kind and a configuration.
    Products are taken in float32, as those of the captured states: in bfloat16 their rounding alone would cost more
    than a module at 4 bits does.
    """
    first = slice(layer.settings["sequences"])
    pairs = _pairs(layer)
    exact = QuantizedPoint(layer.model, lambda _: layer.grids, matmul_dtype=torch.float32)
    by_pair = exact.divergences_alone(
        layer.layer, layer.hidden[first], layer.last[first], [(module.id, spec) for module, spec in pairs]
    )
    for (module, spec), divergences in zip(pairs, by_pair, strict=True):
        stderr = standard_error(divergences)
        yield cost_row(module, spec, divergence=float(divergences.mean()), divergence_stderr=stderr)


def _pairs(layer: LayerReplay) -> list[tuple[ModuleInfo, QuantSpec]]:
    if "pairs" in layer.settings:
        by_kind = {module.id.kind: module for module in layer.modules}
        return [(by_kind[kind], QuantSpec.parse(name)) for kind, name in layer.settings["pairs"]]
    return [(module, QuantSpec.parse(name)) for module in layer.modules for name in layer.settings["specs"]]


DIVERGENCE = Cost(
    name="divergence",
    title="Measured divergence",
    schema=MODULE_DIVERGENCE_SCHEMA,
    needs=frozenset({Need.GRIDS, Need.STATES, Need.LAST_STATES}),
    settings=("specs", "sequences"),
    version=2,
    measure=measure_divergence,
    columns=(
        CostColumn(
            name="divergence",
            label="measured divergence",
            column="divergence",
            title="Measured divergence",
            meaning="KL divergence to full precision of the model with one module quantized alone, in nats per token.",
        ),
    ),
)
