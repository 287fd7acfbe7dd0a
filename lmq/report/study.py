"""Studies of the measurements themselves: do sensitivity patterns agree, and do cheap costs predict the exact one?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.layers.importance.correlation import rank_correlations
from lmq.model.structure import ModuleId, ModuleInfo

DIMENSIONS = ("model", "text", "quantizer", "configuration")

Profile = Sequence[float | None]
"""One number per layer; None was not measured."""


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """What activation sensitivity was measured with."""

    model: str
    text: str
    quantizer: str
    configuration: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Spearman's ρ of one part's sensitivity over the layers, for two settings that differ in one dimension.

    `steps` is ρ of the ratios between neighbouring layers, which leaves out that sensitivity rises with depth
    everywhere and is what outlier layers are found by. None where it is not defined.
    """

    dimension: str
    first: Setting
    second: Setting
    part: str
    profiles: float | None
    steps: float | None


@dataclass(frozen=True, kw_only=True)
class AgreementSummary:
    """Means of the agreements of two values of a dimension over all that else was varied, by part and over all."""

    dimension: str
    first: str
    second: str
    by_part: Mapping[str, float | None]
    profiles: float | None
    lowest: float | None
    steps: float | None


def agreements(profiles: Mapping[Setting, Mapping[str, Profile]]) -> list[Agreement]:
    """Rank correlations of every two settings that differ in one dimension, part by part.

    `profiles` maps setting → part → one number per layer. Settings with different numbers of layers are not compared.
    """
    every_pair = []
    for first, second in combinations(profiles, 2):
        differing = [name for name in DIMENSIONS if getattr(first, name) != getattr(second, name)]
        if len(differing) != 1 or _layers(profiles[first]) != _layers(profiles[second]):
            continue
        for part in profiles[first]:
            if part not in profiles[second]:
                continue
            pair = (profiles[first][part], profiles[second][part])
            every_pair.append(
                Agreement(
                    dimension=differing[0],
                    first=first,
                    second=second,
                    part=part,
                    profiles=_rank_correlation(*pair),
                    steps=_rank_correlation(*map(_steps, pair)),
                )
            )
    return every_pair


def summarize_agreements(pairs: Sequence[Agreement]) -> list[AgreementSummary]:
    """One summary per dimension and pair of its values, in the order of `DIMENSIONS`."""
    groups: dict[tuple[str, str, str], list[Agreement]] = defaultdict(list)
    for item in pairs:
        values = (getattr(item.first, item.dimension), getattr(item.second, item.dimension))
        groups[item.dimension, *values].append(item)
    return [
        AgreementSummary(
            dimension=dimension,
            first=first,
            second=second,
            by_part={
                part: _mean([item.profiles for item in items if item.part == part])
                for part in dict.fromkeys(item.part for item in items)
            },
            profiles=_mean([item.profiles for item in items]),
            lowest=min((item.profiles for item in items if item.profiles is not None), default=None),
            steps=_mean([item.steps for item in items]),
        )
        for (dimension, first, second), items in sorted(groups.items(), key=lambda entry: DIMENSIONS.index(entry[0][0]))
    ]


def models_by_layers(profiles: Mapping[Setting, Mapping[str, Profile]]) -> dict[int, list[str]]:
    """Number of layers → models; only models of one entry are compared with each other."""
    grouped: dict[int, list[str]] = {}
    for setting, by_part in profiles.items():
        names = grouped.setdefault(_layers(by_part), [])
        if setting.model not in names:
            names.append(setting.model)
    return grouped


@dataclass(frozen=True, kw_only=True)
class CostPair:
    """One module at one configuration: the exact cost of quantizing it alone, and cheap costs by name."""

    module: ModuleId
    spec: QuantSpec
    exact: float
    exact_stderr: float | None
    cheap: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CostQuality:
    """How well a cheap cost orders the pairs as the exact cost does.

    `rho` is Spearman's over all pairs, with the standard error of a bootstrap over pairs; `within` is the mean over
    configurations of ρ among the pairs of one configuration, which telling few bits from many does not raise.
    """

    cost: str
    pairs: int
    rho: float | None
    rho_stderr: float | None
    within: float | None


def sample_pairs(
    modules: Sequence[ModuleInfo], specs: Sequence[QuantSpec], count: int, seed: int
) -> list[tuple[ModuleId, QuantSpec]]:
    """Draw `count` pairs of a module and a configuration without repeats, kinds taking turns.

    All pairs when there are no more. Equal seeds draw equal pairs. Raises InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"{count} pairs cannot be drawn; ask for 1 or more")
    generator = np.random.default_rng(seed)
    by_kind: dict[str, list[tuple[ModuleId, QuantSpec]]] = defaultdict(list)
    for module in modules:
        by_kind[module.id.kind] += [(module.id, spec) for spec in specs]
    turns = [[pairs[index] for index in generator.permutation(len(pairs))] for pairs in by_kind.values()]
    drawn = [pairs[turn] for turn in range(max(map(len, turns))) for pairs in turns if turn < len(pairs)]
    return sorted(drawn[:count])


def cost_qualities(pairs: Sequence[CostPair], *, resamples: int = 1000, seed: int = 0) -> list[CostQuality]:
    """Quality of every cheap cost, best first; a cost that was not measured of every pair is left out."""
    exact = np.array([pair.exact for pair in pairs])
    names = [name for name in pairs[0].cheap if all(name in pair.cheap for pair in pairs)]
    specs = sorted({pair.spec for pair in pairs})
    draws = np.random.default_rng(seed).integers(0, len(pairs), (resamples, len(pairs)))
    qualities = []
    for name in names:
        cheap = np.array([pair.cheap[name] for pair in pairs])
        groups = [np.array([pair.spec == spec for pair in pairs]) for spec in specs]
        qualities.append(
            CostQuality(
                cost=name,
                pairs=len(pairs),
                rho=_rank_correlation(cheap.tolist(), exact.tolist()),
                rho_stderr=_bootstrap_error(cheap[draws], exact[draws]),
                within=_mean([_rank_correlation(cheap[group].tolist(), exact[group].tolist()) for group in groups]),
            )
        )
    return sorted(qualities, key=lambda quality: -1.0 if quality.rho is None else quality.rho, reverse=True)


def _layers(by_part: Mapping[str, Profile]) -> int:
    return len(next(iter(by_part.values())))


def _steps(profile: Profile) -> list[float | None]:
    """Each layer's value divided by that of the layer before."""
    return [after / before if before and after is not None else None for before, after in pairwise(profile)]


def _rank_correlation(first: Profile, second: Profile) -> float | None:
    return rank_correlations({"first": first, "second": second})["first"]["second"]


def _bootstrap_error(first: np.ndarray, second: np.ndarray) -> float | None:
    """Standard deviation of Spearman's ρ over resamples [resamples, pairs]; those without spread are left out."""
    from scipy.stats import rankdata  # takes seconds to import

    ranks = [rankdata(values, axis=1) for values in (first, second)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    correlations = (centred[0] * centred[1]).sum(axis=1)[spread > 0] / spread[spread > 0]
    return float(correlations.std(ddof=1)) if len(correlations) > 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None
