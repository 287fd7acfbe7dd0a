"""SensiBoost and KurtBoost: a uniform base, and more bits for the layers where a profile jumps.

Source: Zhang et al. 2025 (arXiv 2503.06518), section 3.4 and algorithm 1. As published, a boosted model is larger
than the budget its base fits; with `paid` the least sensitive modules give the bytes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, module_profile, profile_outliers, reduce_to_fit
from lmq.errors import InputError, unknown_name
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId
from lmq.outliers import check_top_m, profiles_by_kind

ALLOWED_BOOST_STOPS = (1, 2, 3)
SIGNAL = {"sensi-boost": "sensitivity", "kurt-boost": "kurtosis"}
_SIGNALS = tuple(SIGNAL.values())


@dataclass(frozen=True, kw_only=True)
class _Boost:
    """Options of both boosts.

    boost_stop: how many of the 12 standard stops an outlier module moves up (2 or 3 in the paper).
    top_m: how many outlier layers count per module kind; 0 is all of them.
    paid: take the bytes back from the least sensitive modules until the budget holds; the paper does not.
    """

    boost_stop: int = 2
    top_m: int = 0
    paid: bool = False
    keeps_constraints: ClassVar[bool] = False
    quantizer: ClassVar[str | None] = "hqq"
    signal: ClassVar[str]

    def __post_init__(self) -> None:
        check_boost_options(self.boost_stop, self.top_m)

    @property
    def needs(self) -> frozenset[str]:
        """The signal whose jumps are looked for."""
        return frozenset({self.signal})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Boost the outlier modules over the largest uniform base that fits.

        Unless `paid`, the size may be above the budget. Raises InfeasibleBudget, InputError.
        """
        choices = Choices.of(measurements, budget_bytes)
        signal = module_profile(measurements, self.signal, choices.modules)
        outliers = profile_outliers(measurements, self.signal, signal, self.top_m)
        base = choices.largest_uniform(budget_bytes)
        columns = boost(choices, base, outliers, self.boost_stop)
        if self.paid:
            columns = _pay(choices, columns, base, signal, budget_bytes)
        return choices.allocation(columns, boosted=columns > base)


@dataclass(frozen=True, kw_only=True)
class SensiBoost(_Boost):
    """Boost where activation sensitivity jumps by a factor from one layer to the next."""

    name: ClassVar[str] = "sensi-boost"
    summary: ClassVar[str] = "uniform, with more bits in layers where activation sensitivity jumps"
    source: ClassVar[str] = "Zhang et al. 2025, arXiv 2503.06518"
    signal: ClassVar[str] = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class KurtBoost(_Boost):
    """Boost where the kurtosis of the weights jumps from one layer to the next."""

    name: ClassVar[str] = "kurt-boost"
    summary: ClassVar[str] = "uniform, with more bits in layers where the kurtosis of the weights jumps"
    source: ClassVar[str] = "Zhang et al. 2025, arXiv 2503.06518"
    signal: ClassVar[str] = "kurtosis"


@dataclass(frozen=True, kw_only=True)
class RandomBoost:
    """Ablation: as many boosted layers per module kind, drawn from those that neither boost chooses.

    like: the boost whose count of layers is copied. seed: of the draw. boost_stop and top_m: as there.
    """

    like: Literal["sensi-boost", "kurt-boost"] = "sensi-boost"
    seed: int = 42
    boost_stop: int = 2
    top_m: int = 0
    name: ClassVar[str] = "random-boost"
    summary: ClassVar[str] = "ablation: as many boosted layers, drawn at random from the others"
    source: ClassVar[str] = "Zhang et al. 2025, arXiv 2503.06518, ablation"
    keeps_constraints: ClassVar[bool] = False
    quantizer: ClassVar[str | None] = "hqq"

    def __post_init__(self) -> None:
        check_boost_options(self.boost_stop, self.top_m)
        if self.like not in SIGNAL:
            raise unknown_name("boost to be like", self.like, SIGNAL)
        if self.seed < 0:
            raise InputError(f"seed = {self.seed} is negative; give 0 or more")

    @property
    def needs(self) -> frozenset[str]:
        """Both signals: a layer that either would choose is not drawn."""
        return frozenset(_SIGNALS)

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Boost the drawn modules; the size may be above the budget. Raises InfeasibleBudget, InputError."""
        choices = Choices.of(measurements, budget_bytes)
        profiles = {name: module_profile(measurements, name, choices.modules) for name in _SIGNALS}
        outliers_by_signal = {
            name: profile_outliers(measurements, name, profiles[name], self.top_m) for name in _SIGNALS
        }
        generator = np.random.default_rng(self.seed)
        drawn: dict[str, list[int]] = {}
        for kind, profile in profiles_by_kind(profiles["sensitivity"]).items():
            others = sorted(set(profile).difference(*(outliers[kind] for outliers in outliers_by_signal.values())))
            count = min(len(outliers_by_signal[SIGNAL[self.like]][kind]), len(others))
            drawn[kind] = generator.choice(np.array(others, int), count, replace=False).tolist()
        base = choices.largest_uniform(budget_bytes)
        columns = boost(choices, base, drawn, self.boost_stop)
        return choices.allocation(columns, boosted=columns > base)


def check_boost_options(boost_stop: int, top_m: int) -> None:
    """Raise InputError for a boost_stop or top_m that is not allowed."""
    if boost_stop not in ALLOWED_BOOST_STOPS:
        raise InputError(f"boost_stop = {boost_stop} is not allowed; allowed: {ALLOWED_BOOST_STOPS}")
    check_top_m(top_m)


def boost(choices: Choices, base: int, layers: Mapping[str, list[int]], boost_stop: int) -> np.ndarray:
    """Columns [modules] with every module at column `base`, and those in the layers of their kind boosted."""
    up = boosted_column(choices.specs, base, boost_stop)
    return np.array([up if module.id.layer in layers[module.id.kind] else base for module in choices.modules])


def boosted_column(specs: tuple[QuantSpec, ...], base: int, boost_stop: int) -> int:
    """Column of the configuration `boost_stop` stops above the base, clamped to the top stop.

    `specs` is the menu by size. Where it lacks that stop it is the next larger one, or else the largest.
    """
    base_stop = sum(stop.bits_per_weight <= specs[base].bits_per_weight for stop in STOPS) - 1
    target = STOPS[min(base_stop + boost_stop, len(STOPS) - 1)]
    columns = range(base, len(specs))
    return next((column for column in columns if specs[column].bits_per_weight >= target.bits_per_weight), columns[-1])


def _pay(
    choices: Choices, columns: np.ndarray, base: int, signal: Mapping[ModuleId, float | None], budget_bytes: int
) -> np.ndarray:
    """Move modules down until the budget holds: the least sensitive first, the boosted ones last.

    A matrix without a number is constant, loses nothing, and so gives first.
    """
    by_signal = sorted(range(len(columns)), key=lambda row: signal[choices.modules[row].id] or 0.0)
    others = [row for row in by_signal if columns[row] <= base]
    boosted = [row for row in by_signal if columns[row] > base]
    return reduce_to_fit(choices, columns, [others, boosted], budget_bytes)
