"""Frobenius error table: lmq against hqq quantize + dequantize + norm, speed and agreement.

    python -m benchmarks.frobenius [--size 4096] [--threads 1]

Both are timed on one matrix of heavy-tailed weights (kurtosis 8), float32, CPU. hqq's error is taken with its float
scales and zeros; `difference` compares it with our fit before its metadata is stored, `stored` is what 8-bit metadata
adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from hqq.core.quantize import Quantizer as PackageQuantizer

from benchmarks.llama_files import heavy_tailed
from lmq.formats.groups import nearest_codes, to_groups
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.grids import fit_grids
from lmq.quantizers import quantizer

Result = TypeVar("Result")


def package_error(weight: torch.Tensor, spec: QuantSpec, axis: int) -> float:
    codes, meta = PackageQuantizer.quantize(
        weight, nbits=spec.bits, group_size=spec.group_size, axis=axis, device="cpu", compute_dtype=torch.float32
    )
    meta["compute_dtype"] = torch.float32
    return float((PackageQuantizer.dequantize(codes, meta) - weight).double().norm())


def lmq_error(weight: torch.Tensor, spec: QuantSpec, axis: int) -> float:
    return frobenius_errors(weight, list(fit_grids(weight, [spec], quantizer("hqq", axis=axis)).values()))[0]


def unstored_error(weight: torch.Tensor, spec: QuantSpec, axis: int) -> float:
    scale, zero = quantizer("hqq", axis=axis).fit(weight, spec)
    groups = to_groups(weight, spec.group_size, axis)
    codes = nearest_codes(groups, scale, zero, spec.bits)
    return float(((codes - zero[:, None]) * scale[:, None] - groups).double().norm())


def timed(call: Callable[[torch.Tensor, QuantSpec, int], Result], *args: object, repeats: int) -> tuple[Result, float]:
    """Result and the shortest of a few times, in CPU seconds."""
    elapsed_s = []
    for _ in range(repeats):
        start = time.process_time()
        result = call(*args)  # type: ignore[arg-type]
        elapsed_s.append(time.process_time() - start)
    return result, min(elapsed_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="Frobenius error table: lmq against hqq")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--threads", type=int, default=1, help="threads of both")
    parser.add_argument("--axis", type=int, default=1, choices=(0, 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = heavy_tailed((options.size, options.size), torch.Generator().manual_seed(0))
    print(f"{options.size} x {options.size}, axis {options.axis}, {options.threads} threads")
    print(f"{'':8}{'hqq s':>9}{'lmq s':>9}{'ratio':>8}{'difference':>13}{'stored':>9}")
    ratios, seconds = [], torch.zeros(2)
    for spec in STOPS:
        reference, package_s = timed(package_error, weight, spec, options.axis, repeats=1)
        stored, lmq_s = timed(lmq_error, weight, spec, options.axis, repeats=3)
        unstored = unstored_error(weight, spec, options.axis)
        ratios.append(package_s / lmq_s)
        seconds += torch.tensor([package_s, lmq_s])
        print(
            f"{spec.name:8}{package_s:9.2f}{lmq_s:9.3f}{ratios[-1]:7.1f}x"
            f"{abs(unstored / reference - 1):13.1e}{stored / unstored - 1:+9.2%}"
        )
    package_s, lmq_s = seconds.tolist()
    print(f"{'all':8}{package_s:9.2f}{lmq_s:9.3f}{package_s / lmq_s:7.1f}x   {min(ratios):.1f}x to {max(ratios):.1f}x")


if __name__ == "__main__":
    main()
