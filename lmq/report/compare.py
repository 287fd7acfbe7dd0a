"""Several runs side by side: which results may be compared, who wins how often, and what nothing else beats.

Within one run: what uniform quantization would reach at the size of a variant (`equal_bytes`), and which variant to
use instead of each uniform one (`verdicts`).
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from lmq.errors import InputError
from lmq.report.data import PairedDifference
from lmq.report.results import FULL_PRECISION, UNIFORM, VariantResult, full_precision_of

_DECIMALS = 2
"""Perplexities are compared as the SensiBoost paper prints them."""

Runs = Mapping[str, Sequence[VariantResult]]
"""Results by the name of their run."""


@dataclass(frozen=True, kw_only=True, order=True)
class Yardstick:
    """What a model was judged on. Perplexities with different yardsticks say nothing about each other.

    Runs do not record their evaluation text in their results; the full-precision model's perplexity on it tells two
    texts apart.
    """

    model: str
    protocol: str
    tokens: int
    full_precision: str


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often `strategy` had a lower, the same or a higher perplexity than `against` at one budget."""

    strategy: str
    against: str
    wins: int = 0
    ties: int = 0
    losses: int = 0


def by_yardstick(runs: Runs) -> dict[Yardstick, list[tuple[str, VariantResult]]]:
    """Measured variants that may be compared with each other, each with the name of its run.

    Raises InputError when there is no run.
    """
    if not runs:
        raise InputError("there is no run to compare; name one or more run directories")
    groups: dict[Yardstick, list[tuple[str, VariantResult]]] = defaultdict(list)
    for run, results in runs.items():
        for result in results:
            if result.perplexity is None:
                continue
            full = full_precision_of(result.model, results)
            reference = "not measured" if full is None or full.perplexity is None else f"{full.perplexity:.4f}"
            yardstick = Yardstick(
                model=result.model,
                protocol=result.protocol or "unknown protocol",
                tokens=result.tokens or 0,
                full_precision=reference,
            )
            groups[yardstick].append((run, result))
    return dict(sorted(groups.items()))


def pareto_front(results: Sequence[VariantResult]) -> list[VariantResult]:
    """Quantized variants that no other one of `results` beats in size without being worse in perplexity, by size.

    All must have one yardstick. Of variants with equal size and perplexity the first stands.
    """
    sized = [r for r in results if r.strategy != FULL_PRECISION and r.size_bytes is not None]
    front: list[VariantResult] = []
    for result in sorted(sized, key=lambda r: (r.size_bytes or 0, r.perplexity or 0.0)):
        if not front or (result.perplexity or 0.0) < (front[-1].perplexity or 0.0):
            front.append(result)
    return front


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Perplexities of one strategy at one budget under several seeds: how much of a difference is luck."""

    model: str
    strategy: str
    budget: str
    count: int
    mean: float
    deviation: float


def seeded_draws(results: Sequence[VariantResult]) -> list[Draws]:
    """Mean and standard deviation over the seeds of every strategy that was drawn more than once (`random-boost`).

    `strategy` is its label without the seed; other options keep their draws apart. All of one model must have one
    yardstick.
    """
    perplexities: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for result in results:
        seedless = re.sub(r" seed=\d+\b", "", result.strategy)
        if result.budget is not None and result.perplexity is not None:
            perplexities[result.model, seedless, result.budget].append(result.perplexity)
    return [
        Draws(
            model=model,
            strategy=strategy,
            budget=budget,
            count=len(values),
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values),
        )
        for (model, strategy, budget), values in perplexities.items()
        if len(values) > 1
    ]


def tallies(groups: Mapping[Yardstick, Sequence[tuple[str, VariantResult]]]) -> list[Tally]:
    """Wins, ties and losses of every two strategies, best first; perplexities are rounded to two decimals.

    A cell is a yardstick and a budget where both strategies were measured; a strategy that stands there several times
    (other options, another run) counts with its best.
    """
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in _cells(groups):
        for first, second in permutations(cell, 2):
            place = 1 if cell[first] == cell[second] else 0 if cell[first] < cell[second] else 2
            counts[first, second][place] += 1
    pairs = [
        Tally(strategy=first, against=second, wins=wins, ties=ties, losses=losses)
        for (first, second), (wins, ties, losses) in counts.items()
    ]
    won: dict[str, int] = defaultdict(int)
    for tally in pairs:
        won[tally.strategy] += tally.wins - tally.losses
    return sorted(pairs, key=lambda t: (-won[t.strategy], t.strategy, -won[t.against], t.against))


@dataclass(frozen=True, kw_only=True)
class EqualBytes:
    """A variant, and uniform quantization's perplexity at its size, interpolated between `smaller` and `larger`."""

    variant: VariantResult
    uniform_perplexity: float
    smaller: VariantResult
    larger: VariantResult

    @property
    def relative(self) -> float:
        """Perplexity of the variant over that of uniform at equal bytes, minus 1: below 0 is better."""
        return (self.variant.perplexity or math.nan) / self.uniform_perplexity - 1


def equal_bytes(results: Sequence[VariantResult]) -> list[EqualBytes]:
    """Every variant of one model that is between two measured uniform ones in size, in the order given.

    ln(perplexity) is taken as linear in the size between neighbours. Beyond the smallest and the largest uniform
    variant nothing is said: an extrapolated rival would be made up.
    """
    sized = [r for r in results if r.size_bytes is not None and r.perplexity is not None]
    uniform = sorted((r for r in sized if r.strategy == UNIFORM), key=lambda r: (r.size_bytes or 0, r.perplexity or 0))
    comparisons = []
    for variant in sized:
        size = variant.size_bytes or 0
        smaller = [r for r in uniform if (r.size_bytes or 0) <= size]
        larger = [r for r in uniform if (r.size_bytes or 0) >= size]
        if variant.strategy not in (UNIFORM, FULL_PRECISION) and smaller and larger:
            below, above = smaller[-1], larger[0]
            perplexity = _between(below, above, size)
            comparisons.append(EqualBytes(variant=variant, uniform_perplexity=perplexity, smaller=below, larger=above))
    return comparisons


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best variant that takes no more bytes than `uniform`; `best` is `uniform` itself where nothing beat it.

    `gap_closed` is the share of ln(perplexity) between uniform and full precision that `best` wins back, None
    where full precision was not measured; `gap_closed_stderr` only where a paired difference was given.
    """

    uniform: VariantResult
    best: VariantResult
    gap_closed: float | None
    gap_closed_stderr: float | None
    distinguishable: bool | None

    @property
    def beats_uniform(self) -> bool:
        """Whether another strategy has a lower perplexity."""
        return self.best is not self.uniform


def verdicts(model: str, results: Sequence[VariantResult], paired: Sequence[PairedDifference] = ()) -> list[Verdict]:
    """One verdict for each uniform variant of `model` that was measured, by size."""
    own = [r for r in results if r.model == model and r.perplexity is not None and r.size_bytes is not None]
    uniform = sorted((r for r in own if r.strategy == UNIFORM), key=lambda r: r.size_bytes or 0)
    full = full_precision_of(model, results)
    return [_verdict(one, own, full, [p for p in paired if p.model == model]) for one in uniform]


def best_measured(model: str, results: Sequence[VariantResult]) -> VariantResult | None:
    """The quantized variant of `model` with the lowest perplexity, whatever its size."""
    own = [r for r in results if r.model == model and r.strategy != FULL_PRECISION and r.perplexity is not None]
    return min(own, key=lambda r: r.perplexity or math.inf, default=None)


def _cells(groups: Mapping[Yardstick, Sequence[tuple[str, VariantResult]]]) -> Iterator[dict[str, float]]:
    """Strategy → rounded perplexity, for every yardstick and budget."""
    for members in groups.values():
        cells: dict[str, dict[str, float]] = defaultdict(dict)
        for _, result in members:
            if result.budget is None or result.perplexity is None:
                continue
            perplexity = round(result.perplexity, _DECIMALS)
            cell = cells[result.budget]
            cell[result.strategy] = min(perplexity, cell.get(result.strategy, perplexity))
        yield from cells.values()


def _between(below: VariantResult, above: VariantResult, size_bytes: int) -> float:
    low, high = math.log(below.perplexity or 0.0), math.log(above.perplexity or 0.0)
    span = (above.size_bytes or 0) - (below.size_bytes or 0)
    share = (size_bytes - (below.size_bytes or 0)) / span if span else 0.0
    return math.exp(low + share * (high - low))


def _verdict(
    uniform: VariantResult,
    own: Sequence[VariantResult],
    full: VariantResult | None,
    paired: Sequence[PairedDifference],
) -> Verdict:
    limit = uniform.size_bytes or 0
    fitting = [r for r in own if r.strategy not in (UNIFORM, FULL_PRECISION) and (r.size_bytes or 0) <= limit]
    best = min([uniform, *fitting], key=lambda r: r.perplexity or math.inf)
    gap = None
    if full is not None and full.perplexity and uniform.perplexity and uniform.perplexity > full.perplexity:
        gap = math.log(uniform.perplexity / full.perplexity)
    closed = (
        math.log(uniform.perplexity / best.perplexity) / gap if gap and uniform.perplexity and best.perplexity else None
    )
    pair = next((p for p in paired if (p.variant, p.baseline) == (best.label, uniform.label)), None)
    return Verdict(
        uniform=uniform,
        best=best,
        gap_closed=closed,
        gap_closed_stderr=pair.stderr / gap if pair and gap else None,
        distinguishable=abs(pair.difference) > 2 * pair.stderr if pair else None,
    )
