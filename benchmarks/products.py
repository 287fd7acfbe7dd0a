"""Float32 products of linear layers on the processor: oneDNN, which lmq uses, against torch's own.

    python -m benchmarks.products [--threads 1]

Medians of several calls, in CPU seconds; the shapes are those of SmolLM2-135M and Llama-2-7B.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmq.numerics import linear

SHAPES = ((1, 576, 576), (1024, 576, 576), (1024, 576, 1536), (512, 576, 49152), (1024, 4096, 4096), (4096, 4096, 4096))
"""Tokens, in_features, out_features."""


def median_seconds(multiply: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, weight: Tensor, calls: int) -> float:
    multiply(inputs, weight)
    seconds = []
    for _ in range(calls):
        started = time.process_time()
        multiply(inputs, weight)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    print(f"{'tokens':>7}{'in':>7}{'out':>7}{'torch ms':>11}{'oneDNN ms':>11}{'ratio':>8}{'difference':>12}")
    for tokens, in_features, out_features in SHAPES:
        inputs, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features)
        calls = 5 if tokens * in_features * out_features > 1e9 else 25
        usual = median_seconds(nn.functional.linear, inputs, weight, calls)
        ours = median_seconds(linear, inputs, weight, calls)
        expected = nn.functional.linear(inputs, weight)
        difference = float((linear(inputs, weight) - expected).norm() / expected.norm())
        print(
            f"{tokens:>7}{in_features:>7}{out_features:>7}{usual * 1e3:>11.2f}{ours * 1e3:>11.2f}"
            f"{usual / ours:>7.1f}x{difference:>12.1e}"
        )


if __name__ == "__main__":
    main()
