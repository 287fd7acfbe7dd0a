"""MXQ: the least sum of weight errors under the budget, as a mixed-integer linear program, and its variants.

Source: Zhang et al. 2025 (MXQ, ICAART), equations 1 to 3. In the authors' own tables plain MXQ has a higher
perplexity than uniform HQQ at equal nominal bits: a sum of unweighted norms does not follow the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import (
    Choices,
    Measurements,
    module_profile,
    profile_outliers,
    solve_program,
    table_costs,
)
from lmq.measurement.weights import scaled_profiles
from lmq.model.structure import ModuleId
from lmq.outliers import check_top_m

OUTLIER_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Mxq:
    """Least sum of Frobenius norms of the weight errors."""

    name: ClassVar[str] = "mxq"
    summary: ClassVar[str] = "least sum of weight errors (Frobenius norms) within the budget"
    source: ClassVar[str] = "Zhang et al. 2025, MXQ (ICAART)"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = "hqq"

    @property
    def needs(self) -> frozenset[str]:
        """The Frobenius error table."""
        return frozenset({"frobenius"})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the norms as they are. Raises InfeasibleBudget, InputError."""
        return solve_program(
            measurements, budget_bytes, lambda choices: table_costs(measurements, "frobenius", choices)
        )


@dataclass(frozen=True, kw_only=True)
class KurtScaled:
    """MXQ with each norm multiplied by 1 + the module's kurtosis, scaled to 0…1 over the layers of its kind."""

    name: ClassVar[str] = "kurt-scaled"
    summary: ClassVar[str] = "mxq with weight errors multiplied by 1 + scaled kurtosis"
    source: ClassVar[str] = "Zhang et al. 2025, MXQ (ICAART), variant of the authors' program"
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = "hqq"

    @property
    def needs(self) -> frozenset[str]:
        """The Frobenius error table and the kurtosis."""
        return frozenset({"frobenius", "kurtosis"})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the scaled norms. Raises InfeasibleBudget, InputError."""

        def costs_of(choices: Choices) -> np.ndarray:
            norms = table_costs(measurements, "frobenius", choices)
            return norms * (1 + scaled_kurtosis(measurements, choices))[:, None]

        return solve_program(measurements, budget_bytes, costs_of)


@dataclass(frozen=True, kw_only=True)
class _PenaltyProgram:
    """Least sum of penalties for few bits, doubled on outlier layers.

    top_m: how many outlier layers count per module kind; 0 is all of them.
    """

    top_m: int = 0
    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = "hqq"
    signal: ClassVar[str]

    def __post_init__(self) -> None:
        check_top_m(self.top_m)

    @property
    def needs(self) -> frozenset[str]:
        """The signal whose jumps are looked for."""
        return frozenset({self.signal})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the penalties. Raises InfeasibleBudget, InputError."""
        return solve_program(measurements, budget_bytes, lambda choices: self._costs(measurements, choices))

    def _costs(self, measurements: Measurements, choices: Choices) -> np.ndarray:
        """penalty(bits) · factor / bits per weight · 100 · share of the parameters, [modules, configurations]."""
        signal = module_profile(measurements, self.signal, choices.modules)
        outliers = profile_outliers(measurements, self.signal, signal, self.top_m)
        factor = [OUTLIER_FACTOR if m.id.layer in outliers[m.id.kind] else 1.0 for m in choices.modules]
        parameters = np.array([module.parameters for module in choices.modules], dtype=np.float64)
        weight = np.array(factor) * 100 * parameters / parameters.sum()
        return weight[:, None] * np.array([_penalty(spec.bits) / spec.bits_per_weight for spec in choices.specs])


@dataclass(frozen=True, kw_only=True)
class SensiMilp(_PenaltyProgram):
    """Penalties doubled where activation sensitivity jumps."""

    name: ClassVar[str] = "sensi-milp"
    summary: ClassVar[str] = "least sum of penalties for few bits, doubled in layers where sensitivity jumps"
    source: ClassVar[str] = "Zhang et al. 2025, MXQ (ICAART), variant of the authors' program"
    signal: ClassVar[str] = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class KurtMilp(_PenaltyProgram):
    """Penalties doubled where the kurtosis of the weights jumps."""

    name: ClassVar[str] = "kurt-milp"
    summary: ClassVar[str] = "least sum of penalties for few bits, doubled in layers where kurtosis jumps"
    source: ClassVar[str] = "Zhang et al. 2025, MXQ (ICAART), variant of the authors' program"
    signal: ClassVar[str] = "kurtosis"


def scaled_kurtosis(measurements: Measurements, choices: Choices) -> np.ndarray:
    """Kurtosis [modules] float64 scaled to 0…1 over the layers of each kind; 0 where all layers have the same."""
    kurtosis = module_profile(measurements, "kurtosis", choices.modules)
    scaled = {
        ModuleId(layer, kind): value
        for profiles in measurements.by_tower(kurtosis)
        for kind, profile in scaled_profiles(profiles).items()
        for layer, value in profile.items()
    }
    return np.array([scaled[module.id] for module in choices.modules])


def _penalty(bits: int) -> float:
    if bits < 3:
        return 4.0
    return 2.0 if bits < 4 else 1.0
