"""Calibrated quantization of one decoder layer of a large model's shape: seconds and peak memory of every step.

    python -m benchmarks.large_layer [--device cpu|cuda] [--sequences 32] [--menu b3g64,b4g64] [--shape Llama-2-7B]
        [--kinds mlp.down_proj]

Random heavy-tailed weights, states and gradients. The steps are those of a run: Fisher-weighted second moments of every
module's inputs, codes of every configuration, and the sequence-wise Fisher cost of these codes. The last column
multiplies by the layers of the whole model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.llama_files import LLAMA_2_7B, LLAMA_3_1_70B, SMOLLM2_135M, write_llama
from benchmarks.memory import peak_bytes
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import quantize_modules
from lmq.measurement.quantizer_moments import backward_with_moments
from lmq.measurement.sequence_fisher import sequence_loss_changes
from lmq.measurement.traces import trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.numerics import fast_matmul_dtype
from lmq.quantizers import quantizer

T = TypeVar("T")
SHAPES = {shape.name: shape for shape in (LLAMA_2_7B, LLAMA_3_1_70B, SMOLLM2_135M)}
SEQUENCE_LENGTH = 512


def main() -> None:
    options = _arguments()
    shape, device = SHAPES[options.shape], torch.device(options.device)
    menu = [QuantSpec.parse(name) for name in options.menu.split(",")]
    print(f"{shape.name}, {options.sequences} sequences of {SEQUENCE_LENGTH} tokens, {_name(device)}\n")
    print(f"| step | seconds a layer | peak GB | minutes for {shape.layers} layers |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), shape, blocks=1)
        model = StreamedModel.open(Path(folder), discover(Path(folder)), device=device)
        kinds = tuple(filter(None, options.kinds.split(","))) or model.structure.kinds
        _measure(model, menu, kinds, options.sequences, shape.layers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--menu", default="b4g64", help="configurations (default b4g64)")
    parser.add_argument("--shape", default=LLAMA_2_7B.name, choices=SHAPES)
    parser.add_argument("--kinds", default="", help="modules, as in self_attn.q_proj,mlp.down_proj (default all)")
    return parser.parse_args()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _measure(model: StreamedModel, menu: list[QuantSpec], kinds: Sequence[str], sequences: int, layers: int) -> None:
    generator = torch.Generator(model.device).manual_seed(0)
    size = (sequences, SEQUENCE_LENGTH, model.structure.hidden_size)
    hidden = torch.randn(size, generator=generator, device=model.device)
    gradient = torch.randn(size, generator=generator, device=model.device)
    inputs = model.block_inputs(SEQUENCE_LENGTH)[0]
    modules = [module for module in model.structure.in_layer(0) if module.id.kind in kinds]
    chosen = quantizer("fisher-gptq")
    with model.block(0) as block:
        _, moments = _timed(
            "gradient and second moments",
            layers,
            lambda: backward_with_moments(block, inputs, hidden, gradient, kinds, layer=0),
        )
        weights = {
            module.id: block.get_submodule(module.id.kind).get_parameter("weight").detach() for module in modules
        }
        of_modules = {module.id: moments[module.id.kind] for module in modules}
        what = f"codes of {len(menu)} configuration{'s' * (len(menu) > 1)}"
        grids = _timed(what, layers, lambda: quantize_modules(weights, menu, chosen, of_modules))

        def costs() -> None:
            dtype = fast_matmul_dtype(model.device)
            traces = trace_modules(block, inputs, hidden, gradient, kinds, dtype)
            for module in modules:
                weight = weights[module.id]
                errors = {spec: (grid.round_trip(weight) - weight).to(dtype) for spec, grid in grids[module.id].items()}
                sequence_loss_changes(traces.pop(module.id.kind), errors, sequence_length=SEQUENCE_LENGTH)

        _timed("sequence-wise Fisher costs", layers, costs)


def _timed(step: str, layers: int, work: Callable[[], T]) -> T:
    """The result of `work`, and a row of the table."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak_gb = (torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()) / 1e9
    print(f"| {step} | {seconds:.1f} | {peak_gb:.1f} | {seconds * layers / 60:.1f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
