"""Perplexity over strided windows, as the SensiBoost authors and Hugging Face compute it, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmq.errors import InputError


@dataclass(frozen=True)
class Window:
    """Tokens `start:end` are seen at once; the last `fresh` of them are new, the others are context."""

    start: int
    end: int
    fresh: int

    @property
    def scored(self) -> int:
        """Tokens that get a probability: the very first token of a text has nothing before it."""
        return self.fresh - 1 if self.start == 0 else self.fresh


def full_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of exactly `window` tokens, `stride` apart, over at most `tokens` tokens.

    Tokens after the last full window are left out. Raises InputError when there is not even one window.
    """
    if tokens < window:
        raise InputError(
            f"the evaluation text has {tokens} tokens, fewer than one window of {window}; "
            "give a longer text or a smaller evaluation.window"
        )
    windows = [Window(0, window, window)]
    for start in range(stride, tokens - window + 1, stride):
        windows.append(Window(start, start + window, stride))
    return windows


@dataclass(frozen=True)
class Estimate:
    """A measured mean with its standard error over windows (None with fewer than two windows)."""

    value: float
    stderr: float | None


def strided_perplexity(windows: Sequence[Window], nll_sums: Sequence[float]) -> Estimate:
    """exp(Σ mean_nll·fresh / last token index): the protocol of the authors' program.

    `nll_sums` are the summed negative log-likelihoods (nats) of each window's scored tokens. The standard
    error is that of the mean over windows, carried through the exponential.
    """
    means = [nll / window.scored for window, nll in zip(windows, nll_sums, strict=True)]
    weighted = sum(mean * window.fresh for window, mean in zip(windows, means, strict=True))
    log_perplexity = weighted / windows[-1].end
    perplexity = math.exp(log_perplexity) if log_perplexity < 700 else math.inf
    error = mean_estimate(means).stderr
    return Estimate(perplexity, None if error is None else perplexity * error)


def mean_estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Weighted mean, and the standard error of the plain mean of the values."""
    weights = weights or [1.0] * len(values)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    if len(values) < 2:
        return Estimate(mean, None)
    centre = sum(values) / len(values)
    variance = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))
