"""The structural rule: no measurement, more bits where models are known to be fragile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation import Allocation
from lmq.strategies.base import Choices, Measurements, reduce_to_fit

FRAGILE_PART = "mlp_down"
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Structural:
    """First and last layer and every down projection one configuration up, paid for evenly by the rest.

    The rest gives way one configuration at a time, in an order that spreads over the depth of the model.
    """

    name: ClassVar[str] = "structural"
    summary: ClassVar[str] = "first and last layer and down projections one configuration up, the rest pays evenly"
    source: ClassVar[str] = "rule of thumb of llama.cpp and mlx mixed quantizations; baseline"
    keeps_constraints: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is measured."""
        return frozenset()

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Apply the rule over the largest uniform base that fits. Raises InfeasibleBudget, InputError."""
        choices = Choices.of(measurements, budget_bytes)
        base = choices.largest_uniform(budget_bytes)
        ends = {min(module.id.layer for module in choices.modules), max(module.id.layer for module in choices.modules)}
        protected = [
            row for row, module in enumerate(choices.modules) if module.id.layer in ends or module.part == FRAGILE_PART
        ]
        rest = sorted(set(range(len(choices.modules))) - set(protected))
        choice = np.full(len(choices.modules), base)
        choice[protected] = min(base + 1, len(choices.specs) - 1)
        choice = reduce_to_fit(choices, choice, [_spread(rest), _spread(protected)], budget_bytes)
        return choices.allocation(choice, boosted=choice > base)


def _spread(rows: list[int]) -> list[int]:
    """The rows in an order whose every beginning covers the model evenly (multiples of the golden ratio)."""
    order = sorted(range(len(rows)), key=lambda index: (index * GOLDEN_RATIO) % 1)
    return [rows[index] for index in order]
