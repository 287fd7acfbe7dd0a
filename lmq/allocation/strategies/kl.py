"""The program with measured costs: the divergence that each module causes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, not_measured, solve_program, table_costs
from lmq.allocation.strategies.loss_aware import non_increasing
from lmq.measurement.module_divergence import carried_costs


@dataclass(frozen=True, kw_only=True)
class Kl:
    """Least sum of measured divergences, each of a model in which one module alone is quantized.

    Configurations that were not measured get the nearest measured one's cost times the ratio of their
    sequence-wise Fisher costs. Made non-increasing in size per module.
    """

    name: ClassVar[str] = "kl"
    summary: ClassVar[str] = "least sum of measured divergences of one quantized module at a time (slow to measure)"
    source: ClassVar[str] = "score as in NVIDIA Model Optimizer's KL scorer; program of MXQ"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = None

    @property
    def needs(self) -> frozenset[str]:
        """The measured divergences, and the Fisher curve that carries them to other configurations."""
        return frozenset({"divergence", "sequence_fisher"})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the carried costs. Raises InfeasibleBudget, InputError."""
        if "divergence" not in measurements.costs:
            raise not_measured("divergence")
        specs = measurements.costs["divergence"].specs

        def costs_of(choices: Choices) -> np.ndarray:
            measured = table_costs(measurements, "divergence", replace(choices, specs=specs))
            both = replace(choices, specs=(*choices.specs, *specs))
            cheap = table_costs(measurements, "sequence_fisher", both)
            return non_increasing(carried_costs(measured, specs, cheap, choices.specs), choices.sizes_bytes)

        return solve_program(measurements, budget_bytes, costs_of)
