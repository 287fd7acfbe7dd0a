"""Perplexity over strided windows, as the SensiBoost authors and Hugging Face compute it, with its standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lmq.errors import InputError

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Window:
    """Tokens `start:end` are seen at once; the last `fresh` of them are new, the others are context."""

    start: int
    end: int
    fresh: int

    @property
    def scored(self) -> int:
        """Tokens that get a probability: the first token of a window without context has nothing before it."""
        return min(self.fresh, self.end - self.start - 1)


def full_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of exactly `window` tokens, `stride` apart, over at most `tokens` tokens.

    Tokens after the last full window are left out. With a stride as large as the window the windows do not
    overlap. Raises InputError for a stride that leaves tokens unscored, and when there is not even one window.
    """
    if window < 2:
        raise InputError(f"window = {window} is too small: a token is scored after at least one other; use 2 or more")
    if not 1 <= stride <= window:
        raise InputError(f"stride = {stride} does not fit a window of {window}; allowed: 1 to {window}")
    if tokens < window:
        raise InputError(
            f"the evaluation text has {tokens} tokens, fewer than one window of {window}; "
            "give a longer text or a smaller evaluation.window"
        )
    later = [Window(start, start + window, stride) for start in range(stride, tokens - window + 1, stride)]
    return [Window(0, window, window), *later]


def protocol_name(windows: Sequence[Window], prefix: Sequence[int] = ()) -> str:
    """`strided 1024/512`, or `non-overlapping 2048` where no token is seen twice.

    With the tokens that every window begins with, if there are any: `strided 1024/512 behind token 2`.
    """
    length, stride = windows[0].end - windows[0].start, windows[-1].fresh
    name = f"non-overlapping {length}" if stride == length else f"strided {length}/{stride}"
    tokens = "token" if len(prefix) == 1 else "tokens"
    return f"{name} behind {tokens} {' '.join(map(str, prefix))}" if prefix else name


def infinite_window(windows: Sequence[Window], nll_sums: Sequence[float]) -> Window | None:
    """The first window whose own perplexity is infinite or exceeds the largest float, if there is one."""
    for window, nll_sum in zip(windows, nll_sums, strict=True):
        if not nll_sum / window.scored < _LARGEST_EXPONENT:
            return window
    return None


@dataclass(frozen=True)
class Estimate:
    """A measured mean with its standard error over windows (None with fewer than two, or where it is not finite)."""

    value: float
    stderr: float | None


def strided_perplexity(windows: Sequence[Window], nll_sums: Sequence[float]) -> Estimate:
    """exp(Σ mean_nll·fresh / last token index): the protocol of the authors' program.

    `nll_sums` are the summed negative log-likelihoods (nats) of each window's scored tokens. The standard
    error is that of the mean over windows, carried through the exponential. What exceeds the largest float is
    infinite, without a standard error.
    """
    means = [nll / window.scored for window, nll in zip(windows, nll_sums, strict=True)]
    weighted = sum(mean * window.fresh for window, mean in zip(windows, means, strict=True))
    log_perplexity = weighted / windows[-1].end
    perplexity = math.exp(log_perplexity) if log_perplexity < _LARGEST_EXPONENT else math.inf
    error = mean_estimate(means).stderr
    return Estimate(perplexity, None if error is None else _finite(perplexity * error))


def mean_estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Weighted mean, and the standard error of the plain mean of the values."""
    weights = weights or [1.0] * len(values)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    if len(values) < 2:
        return Estimate(mean, None)
    centre = sum(values) / len(values)
    variance = sum((value - centre) * (value - centre) for value in values) / (len(values) - 1)
    return Estimate(mean, _finite(math.sqrt(variance / len(values))))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
