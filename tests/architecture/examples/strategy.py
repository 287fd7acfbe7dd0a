"""A new strategy: every second layer at the largest configuration of the menu, as long as it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements


@dataclass(frozen=True, kw_only=True)
class Alternating:
    """Layers `first`, `first` + 2, … get the largest configuration while the budget holds, the others uniform's."""

    name: ClassVar[str] = "alternating"
    summary: ClassVar[str] = "every second layer at the largest configuration"
    source: ClassVar[str] = "an example"
    keeps_constraints: ClassVar[bool] = False
    first: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is measured."""
        return frozenset()

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Raises InfeasibleBudget."""
        choices = Choices.of(measurements, budget_bytes)
        choice = np.zeros(len(choices.modules), int)
        for row, module in enumerate(choices.modules):
            larger = choice.copy()
            larger[row] = len(choices.specs) - 1
            if module.id.layer % 2 == self.first % 2 and choices.size_bytes(larger) <= budget_bytes:
                choice = larger
        return choices.allocation(choice)
