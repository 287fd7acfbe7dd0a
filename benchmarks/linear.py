"""The quantized linear layer against hqq's HQQLinear, and the speed of packing and unpacking.

    python -m benchmarks.linear [--bits 2 3 4 8] [--dtypes float32 bfloat16] [--group-size 64]

Both hold the same codes of the same matrix and multiply the same inputs, in turn; medians of CPU seconds of one thread,
or of seconds on a CUDA device where there is one. hqq runs its PyTorch backend (on a GPU also: its kernels need other
packages). `dense` is torch's own linear layer. Shapes are those of SmolLM2-135M and of a layer of 4096 inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import Tensor, nn

from lmq.formats.packed_layer import QuantizedLinear, quantize_weight
from lmq.formats.packing import pack, unpack
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.quantizers import quantizer

SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))
"""out_features, in_features."""
TOKENS = (1, 512)
_SECONDS = 1.5
"""Measuring time for each set of calls, at least five rounds."""


def median_seconds(calls: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median of each call; they take turns, so that what disturbs the machine disturbs them alike."""
    clock = time.process_time if device == "cpu" else _synchronized_clock
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = clock()
    while len(next(iter(seconds.values()))) < 5 or clock() - started < _SECONDS:
        for name, call in calls.items():
            before = clock()
            call()
            seconds[name].append(clock() - before)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def forward_table(bits: list[int], dtypes: list[torch.dtype], group_size: int, device: str) -> None:
    print(
        f"{'type':<10}{'out':>6}{'in':>6}{'bits':>5}{'tokens':>7}{'dense ms':>10}{'hqq ms':>9}{'lmq ms':>9}{'ratio':>7}"
    )
    for dtype in dtypes:
        for out_features, in_features in SHAPES:
            torch.manual_seed(0)
            dense = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
            for width in bits:
                layers = _layers(dense, QuantSpec(width, group_size), dtype, device)
                for tokens in TOKENS:
                    _print_row(layers, torch.randn(tokens, in_features, device=device, dtype=dtype), width)


def _layers(dense: nn.Linear, spec: QuantSpec, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    grid = fit_grids(dense.weight.float(), [spec], quantizer("rtn"))[spec]
    config = BaseQuantizeConfig(nbits=spec.bits, group_size=spec.group_size, axis=1)
    config["weight_quant_params"]["optimize"] = False
    theirs = HQQLinear(deepcopy(dense), config, compute_dtype=dtype, device=device)
    return {"dense": dense, "hqq": theirs, "lmq": QuantizedLinear.from_linear(dense, grid)}


def _print_row(layers: Mapping[str, nn.Module], inputs: Tensor, bits: int) -> None:
    calls = {name: lambda layer=layer: layer(inputs) for name, layer in layers.items()}
    seconds = median_seconds(calls, inputs.device.type)
    out_features, in_features = layers["dense"].get_parameter("weight").shape
    print(
        f"{str(inputs.dtype).removeprefix('torch.'):<10}{out_features:>6}{in_features:>6}{bits:>5}{len(inputs):>7}"
        f"{seconds['dense'] * 1e3:>10.2f}{seconds['hqq'] * 1e3:>9.2f}{seconds['lmq'] * 1e3:>9.2f}"
        f"{seconds['hqq'] / seconds['lmq']:>6.1f}x",
        flush=True,
    )


def packing_table(bits: list[int], group_size: int, device: str) -> None:
    """GB of float16 weights a second, for a matrix 4096 x 4096."""
    print(f"\n{'GB/s of float16':<20}{'pack':>8}{'unpack':>8}{'quantize':>10}{'dequantize':>12}")
    weight = torch.randn(4096, 4096, device=device)
    for width in bits:
        spec = QuantSpec(width, group_size)
        grid = fit_grids(weight, [spec], quantizer("rtn"))[spec]
        codes = grid.codes(weight)
        packed = pack(codes, width)
        layer = QuantizedLinear.from_linear(_linear(weight), grid)
        calls: dict[str, Callable[[], object]] = {
            "pack": lambda codes=codes, width=width: pack(codes, width),
            "unpack": lambda packed=packed, width=width: unpack(packed, width),
            "quantize": lambda grid=grid: quantize_weight(weight, grid),
            "dequantize": lambda layer=layer: layer.dequantize(torch.float16),
        }
        seconds = median_seconds(calls, device)
        rates = {name: 2 * weight.numel() / 1e9 / value for name, value in seconds.items()}
        print(
            f"{spec.name:<20}{rates['pack']:>8.1f}{rates['unpack']:>8.1f}{rates['quantize']:>10.1f}"
            f"{rates['dequantize']:>12.1f}"
        )


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.cuda.get_device_name() if device == "cuda" else "one thread"
    print(f"torch {torch.__version__}, {place}, groups of {options.group_size}")
    with torch.inference_mode():
        forward_table(options.bits, [getattr(torch, name) for name in options.dtypes], options.group_size, device)
        packing_table(options.bits, options.group_size, device)


if __name__ == "__main__":
    main()
