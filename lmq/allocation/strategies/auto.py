"""Measured: the best of several allocations, refined while the measured divergence falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.refine import Refinement, RefineOptions, Trials, refine
from lmq.allocation.solver import Allocation, check_feasible_program
from lmq.allocation.strategies.base import TRIALS, Choices, Measurements, Strategy
from lmq.allocation.strategies.boost import KurtBoost
from lmq.allocation.strategies.loss_aware import LossAware
from lmq.allocation.strategies.mxq import Mxq
from lmq.allocation.strategies.structural import Structural
from lmq.allocation.strategies.uniform import Uniform
from lmq.errors import InputError, NotFiniteError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId

CANDIDATES: tuple[Strategy, ...] = (Uniform(), Structural(), KurtBoost(paid=True), Mxq(), LossAware(fisher="sequence"))


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Allocations of several strategies at the same bytes, the best of them refined by measured divergence.

    Divergence from full precision is measured on a validation slice of the calibration text, which nothing else
    was measured on. Uniform is among the allocations, so the result is never worse than uniform on that slice; under
    constraints only allocations that keep them are candidates, and uniform is what the gain is stated against.
    rounds: how often the best allocation's local costs are measured anew and steps from it are tried; 0 only chooses.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "best of several allocations by measured divergence, refined while it falls"
    source: ClassVar[str] = "lmq; slopes at the quantized point, true Fisher curvature, knapsack steps"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = None

    rounds: int = 4

    def __post_init__(self) -> None:
        RefineOptions(rounds=self.rounds)

    @property
    def needs(self) -> frozenset[str]:
        """What its candidates need, and trials on the model."""
        return frozenset({TRIALS}).union(*(candidate.needs for candidate in CANDIDATES))

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """The refined allocation. Raises InfeasibleBudget, InputError, NotFiniteError."""
        return self.refine(measurements, budget_bytes)[0]

    def refine(self, measurements: Measurements, budget_bytes: int) -> tuple[Allocation, Refinement]:
        """The refined allocation, and all that were tried with their divergence; raises as `allocate` does."""
        trials = measurements.trials
        if trials is None:
            raise InputError("the strategy auto tries allocations on the model; give measurements with trials")
        choices = Choices.by_size(measurements)
        constraints = measurements.constraints.compile(choices.modules, choices.specs)
        check_feasible_program(choices.sizes_bytes, budget_bytes, constraints)
        free = measurements.constraints.is_empty
        candidates = {each.name: each for each in CANDIDATES if free or each.keeps_constraints}
        column_of = {spec: column for column, spec in enumerate(choices.specs)}

        def columns_of(allocation: dict[ModuleId, QuantSpec]) -> np.ndarray:
            return np.array([column_of[allocation[module.id]] for module in choices.modules])

        def allocation_of(columns: np.ndarray) -> dict[ModuleId, QuantSpec]:
            pairs = zip(choices.modules, columns.tolist(), strict=True)
            return {module.id: choices.specs[column] for module, column in pairs}

        refinement = refine(
            {name: columns_of(each.allocate(measurements, budget_bytes).specs) for name, each in candidates.items()},
            choices.sizes_bytes,
            budget_bytes,
            uniform=columns_of(Uniform().allocate(measurements, budget_bytes).specs),
            measured_losses=lambda columns: _divergences(trials, allocation_of(columns)),
            local_costs=lambda columns: trials.local_costs(allocation_of(columns), choices.specs),
            options=RefineOptions(rounds=self.rounds),
            constraints=None if free else constraints,
        )
        return choices.allocation(refinement.columns), refinement


def _divergences(trials: Trials, allocation: dict[ModuleId, QuantSpec]) -> np.ndarray:
    """Divergence of an allocation on each sequence; infinite when it breaks the model."""
    try:
        return trials.divergences(allocation)
    except NotFiniteError:
        return np.array([np.inf])
