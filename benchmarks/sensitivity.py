"""Output errors of 12 configurations from second moments against replaying the activations; kurtosis against scipy.

    python -m benchmarks.sensitivity [--sizes 1024 4096] [--tokens 8192] [--threads 1]

The replay multiplies all tokens by each quantized weight and compares outputs, as the SensiBoost authors' program does;
`moments` takes tr(E H Eᵀ) for each error E, `capture` is what H itself costs, once for every quantizer and for all
modules that share an input. The errors are random: their values do not change the times. Replay and moments are timed
on one configuration and multiplied by 12.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import scipy.stats
import torch
from torch import Tensor

from lmq.measurement.second_moments import module_errors, second_moments
from lmq.measurement.weights import kurtosis, magnitude_percentiles
from lmq_tasks.process_memory import keep_freed_memory

CONFIGURATIONS = 12
KURTOSIS_SIZE = 4096

Result = TypeVar("Result")


def timed(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """Result and the shortest of a few times, in CPU seconds."""
    elapsed_s = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        elapsed_s.append(time.process_time() - start)
    return result, min(elapsed_s)


def replayed_error(inputs: Tensor, outputs: Tensor, quantized: Tensor) -> float:
    """Mean squared output error, 2,048 tokens at a time."""
    total = 0.0
    for piece, expected in zip(inputs.split(2048), outputs.split(2048), strict=True):
        total += (piece @ quantized.t()).sub_(expected).square_().sum(dtype=torch.float64).item()
    return total / outputs.numel()


def compare_sensitivity(size: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(size, size, generator=generator) * 0.02
    error = torch.randn(size, size, generator=generator) * 0.001
    quantized, outputs = weight + error, inputs @ weight.t()
    moments, capture_s = timed(lambda: second_moments(inputs), repeats=1)
    expected, replay_s = timed(lambda: replayed_error(inputs, outputs, quantized), repeats=2)
    found, moments_s = timed(lambda: module_errors(moments, [error])[0], repeats=2)
    replay_s, moments_s = CONFIGURATIONS * replay_s, CONFIGURATIONS * moments_s
    print(
        f"{size:6}{tokens:8}{replay_s:10.2f}{moments_s:11.2f}{replay_s / moments_s:8.1f}x{capture_s:11.2f}"
        f"{replay_s / (moments_s + capture_s):14.1f}x{abs(found / expected - 1):13.1e}"
    )


def compare_kurtosis() -> None:
    weight = torch.randn(KURTOSIS_SIZE, KURTOSIS_SIZE, generator=torch.Generator().manual_seed(0)) * 0.02
    values = weight.double().numpy().ravel()
    expected, scipy_s = timed(lambda: float(scipy.stats.kurtosis(values, fisher=False, bias=True)), repeats=3)
    single, single_s = timed(
        lambda: float(scipy.stats.kurtosis(weight.numpy().ravel(), fisher=False, bias=True)), repeats=3
    )
    found, lmq_s = timed(lambda: kurtosis(weight), repeats=3)
    _, percentiles_s = timed(lambda: magnitude_percentiles(weight), repeats=3)
    difference = abs(found / expected - 1)
    assert difference < 1e-9, f"kurtosis {found!r} differs from scipy's {expected!r}"
    print(
        f"kurtosis {KURTOSIS_SIZE} x {KURTOSIS_SIZE}: scipy {scipy_s:.3f} s, lmq {lmq_s:.3f} s, "
        f"ratio {scipy_s / lmq_s:.1f}x, difference {difference:.0e}; percentiles of |w| {percentiles_s:.3f} s"
    )
    print(
        f"scipy on float32 {single_s:.3f} s, ratio {single_s / lmq_s:.1f}x; its own difference from float64 is "
        f"{abs(single / expected - 1):.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Sensitivity from second moments against replayed activations")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="in and out features of the module")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    print(f"{CONFIGURATIONS} configurations, float32, {options.threads} threads")
    print(
        f"{'size':>6}{'tokens':>8}{'replay s':>10}{'moments s':>11}{'ratio':>9}{'capture s':>11}"
        f"{'with capture':>15}{'difference':>13}"
    )
    for size in options.sizes:
        compare_sensitivity(size, options.tokens)
    compare_kurtosis()


if __name__ == "__main__":
    main()
