"""The same configuration everywhere: what every other strategy is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lmq.allocation.constraints import Constraints
from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every module at the largest configuration of the menu that fits the budget.

    Constraints are ignored: what they cost is seen against a baseline that has none.
    """

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "every module at the largest configuration that fits the budget"
    source: ClassVar[str] = "baseline"
    keeps_constraints: ClassVar[bool] = False
    quantizer: ClassVar[str | None] = None

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is measured."""
        return frozenset()

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Give every module the same configuration. Raises InfeasibleBudget."""
        choices = Choices.of(replace(measurements, constraints=Constraints()), budget_bytes)
        column = choices.largest_uniform(budget_bytes)
        return choices.allocation(np.full(len(choices.modules), column))
