"""A plan that is given: no measurement, only what the constraints say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, solve_program


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the constraints fix, such as the plan of another model; the budget decides about the rest.

    Modules that nothing is fixed for get the configurations of least rounding error by their bits alone: one bit more
    halves the step, so that the error of a matrix is its weights times 4 to the power of minus its bits.
    """

    name: ClassVar[str] = "plan"
    summary: ClassVar[str] = "what constraints.fixed says of every module, the rest by bits alone; nothing is measured"
    source: ClassVar[str] = "a plan of another run"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = None

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is measured."""
        return frozenset()

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Keep the constraints. Raises InfeasibleBudget, InputError."""
        return solve_program(measurements, budget_bytes, _rounding_errors)


def _rounding_errors(choices: Choices) -> np.ndarray:
    """Float64 [modules, configurations]."""
    parameters = np.array([module.parameters for module in choices.modules], dtype=np.float64)
    errors: np.ndarray = parameters[:, None] * 4.0 ** -np.array([spec.bits_per_weight for spec in choices.specs])
    return errors
