"""The structural rule: no measurement, more bits where models are known to be fragile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, reduce_to_fit

FRAGILE_PART = "mlp_down"
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Structural:
    """First and last layer and down projections one configuration up, paid for evenly by the rest.

    The rest gives way one configuration, in an order that spreads over the depth of the model. Where that does not pay
    for all (one configuration up can double the bits), as many are raised as it pays for: the first and last layer
    first, then down projections from both ends of the model inwards.
    """

    name: ClassVar[str] = "structural"
    summary: ClassVar[str] = "first and last layer and down projections one configuration up, the rest pays evenly"
    source: ClassVar[str] = "rule of thumb of llama.cpp and mlx mixed quantizations; baseline"
    keeps_constraints: ClassVar[bool] = False
    quantizer: ClassVar[str | None] = None

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is measured."""
        return frozenset()

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Apply the rule over the largest uniform base that fits. Raises InfeasibleBudget, InputError."""
        choices = Choices.of(measurements, budget_bytes)
        base = choices.largest_uniform(budget_bytes)
        up, down = min(base + 1, len(choices.specs) - 1), max(base - 1, 0)
        columns = np.full(len(choices.modules), base)
        afforded_bytes = budget_bytes - choices.size_bytes(columns)
        afforded_bytes += int((choices.sizes_bytes[:, base] - choices.sizes_bytes[:, down]).sum())
        protected: list[int] = []
        for row in _fragile_first(choices):
            afforded_bytes -= int(choices.sizes_bytes[row, up] - choices.sizes_bytes[row, down])
            if afforded_bytes < 0:
                break
            protected.append(row)
        columns[protected] = up
        rest = sorted(set(range(len(choices.modules))) - set(protected))
        columns = reduce_to_fit(choices, columns, [_spread(rest), protected], budget_bytes)
        return choices.allocation(columns, boosted=columns > base)


def _fragile_first(choices: Choices) -> list[int]:
    """Rows of the first and last layer, then of the down projections of the others, from the ends inwards."""
    layers = [module.id.layer for module in choices.modules]
    from_end = [min(layer - min(layers), max(layers) - layer) for layer in layers]
    fragile = [row for row, module in enumerate(choices.modules) if not from_end[row] or module.part == FRAGILE_PART]
    return sorted(fragile, key=lambda row: (from_end[row], row))


def _spread(rows: list[int]) -> list[int]:
    """The rows in an order whose every beginning covers the model evenly (multiples of the golden ratio)."""
    order = sorted(range(len(rows)), key=lambda index: (index * GOLDEN_RATIO) % 1)
    return [rows[index] for index in order]
