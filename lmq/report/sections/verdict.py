"""Which variant to use: the best perplexity at no more bytes than each uniform variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmq.report.data import PairedDifference
from lmq.report.results import FULL_PRECISION, UNIFORM, VariantResult, full_precision_of


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
