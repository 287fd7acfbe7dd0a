"""What uniform quantization would reach at the very size of a variant, between measured uniform variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmq.report.results import FULL_PRECISION, UNIFORM, VariantResult


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
    found = []
    for variant in sized:
        size = variant.size_bytes or 0
        smaller = [r for r in uniform if (r.size_bytes or 0) <= size]
        larger = [r for r in uniform if (r.size_bytes or 0) >= size]
        if variant.strategy not in (UNIFORM, FULL_PRECISION) and smaller and larger:
            below, above = smaller[-1], larger[0]
            perplexity = _between(below, above, size)
            found.append(EqualBytes(variant=variant, uniform_perplexity=perplexity, smaller=below, larger=above))
    return found


def _between(below: VariantResult, above: VariantResult, size_bytes: int) -> float:
    low, high = math.log(below.perplexity or 0.0), math.log(above.perplexity or 0.0)
    span = (above.size_bytes or 0) - (below.size_bytes or 0)
    share = (size_bytes - (below.size_bytes or 0)) / span if span else 0.0
    return math.exp(low + share * (high - low))
