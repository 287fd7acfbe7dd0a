"""The whole measuring of a model for 12 configurations and two calibration sets, against the SensiBoost authors' way.

    python -m benchmarks.measuring [MODEL] [--layers 4] [--sequences 16] [--large-sequences 4] [--threads 1]

MODEL is a directory of SmolLM2-135M or another Llama; without one, random weights of that shape are measured. The
second table is of one random block of Llama-2-7B's shape.

Theirs: hqq quantizes and dequantizes every matrix under every configuration for the Frobenius norms; then, for each
set and configuration, once more, with a forward of the block that keeps the inputs of its parts and a run of each
part with its own and with the quantized weights. Quantizing is timed once, one replay of each layer, and multiplied:
marked ~. Of the large block hqq is timed on one matrix and two configurations; the others count by their parameters.
Ours: one fit per matrix and configuration serves everything, and one forward per set all configurations. Products of
changes are taken in bfloat16 where the processor is fast at it. Loss-aware costs, which the authors have none of,
stand apart. Times are CPU seconds. Ours runs in a process of its own, whose peak resident memory above that of its
imports is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from hqq.core.quantize import Quantizer as PackageQuantizer
from torch import Tensor, nn

from benchmarks.llama_files import LLAMA_2_7B, SMOLLM2_135M, write_llama
from benchmarks.memory import peak_bytes
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.activation import part_sensitivity_table
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.grids import fit_grids
from lmq.measurement.replay import backward_block, forward_block
from lmq.measurement.token_fisher import token_fisher
from lmq.measurement.traces import trace_modules
from lmq.measurement.weights import weight_statistics
from lmq.model.block_inputs import BlockInputs
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.numerics import fast_matmul_dtype
from lmq.quantizers import quantizer
from lmq_tasks.process_memory import keep_freed_memory

SETS = 2
SEQUENCE_LENGTH = 512
FEW_CONFIGURATIONS = (QuantSpec(3, 64), QuantSpec(4, 32))
"""What hqq is timed on where matrices are large: together slightly faster than the mean of all 12."""

LARGEST_TIMED = 20_000_000
"""Parameters of a matrix beyond which a block counts as large."""

LLAMA_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("",),
    "mlp": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("",),
}
"""Judged submodule → quantized modules inside it."""

LOSS_AWARE = "loss-aware costs, one set"


class Stopwatch:
    """Sums CPU seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started


def entering_states(model: StreamedModel, sequences: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape, vocabulary = (sequences, SEQUENCE_LENGTH), model.structure.vocabulary_size
    return [model.embed(torch.randint(0, vocabulary, shape, generator=generator)) for _ in range(SETS)]


def measure_ours(path: Path, layers: int, sequences: int) -> dict[str, float]:
    """Seconds by step for the first `layers` layers."""
    watch = Stopwatch()
    structure = discover(path, weights_sha256="")
    model = StreamedModel.open(path, structure)
    inputs = model.block_inputs(SEQUENCE_LENGTH)
    with watch.step("capture"):
        states = entering_states(model, sequences)
    for layer in range(layers):
        grids = {}
        with watch.step("read weights"):
            weights = load_layer_weights(path, structure, layer)
        for module in structure.in_layer(layer):
            weight = weights.pop(module.id.kind)
            with watch.step("kurtosis, percentiles, coarse grids"):
                weight_statistics(module.id, weight)
            with watch.step("grids"):
                grids[module.id.kind] = fit_grids(weight, STOPS, quantizer("hqq"))
            with watch.step("Frobenius errors"):
                frobenius_errors(weight, list(grids[module.id.kind].values()))
        with watch.step("read weights"), model.block(layer) as block:
            pass
        with model.block(layer) as block:
            measure_activations(watch, structure.in_layer(layer), block, inputs[layer], states, grids)
    return dict(watch.seconds)


def measure_activations(
    watch: Stopwatch, modules: Any, block: nn.Module, inputs: BlockInputs, states: list[Tensor], grids: Any
) -> None:
    """Sensitivities on every set, loss-aware costs on the first; `states` become those that leave the block."""
    dtype = fast_matmul_dtype(torch.device("cpu"))
    weights = {kind: block.get_parameter(f"{kind}.weight").detach() for kind in grids}
    rounded = {spec: lambda kind, spec=spec: grids[kind][spec].round_trip(weights[kind]) for spec in STOPS}
    for hidden in states:
        with watch.step("sensitivities"):
            part_sensitivity_table(block, inputs, hidden, modules, rounded, dtype)
    with watch.step(LOSS_AWARE):
        gradient = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(0))
        backward_block(block, inputs, states[0], gradient, layer=0)
        traces = trace_modules(block, inputs, states[0], gradient, list(grids), dtype)
        for kind, trace in traces.items():
            for spec in STOPS:
                token_fisher(trace, rounded[spec](kind) - weights[kind])
    for number, hidden in enumerate(states):
        with watch.step("capture"):
            states[number] = forward_block(block, inputs, hidden, layer=0)


@torch.no_grad()
def measure_theirs(path: Path, layers: int, sequences: int) -> dict[str, float]:
    """Seconds by step for the first `layers` layers, multiplied up to all configurations and sets."""
    watch = Stopwatch()
    structure = discover(path, weights_sha256="")
    model = StreamedModel.open(path, structure)
    inputs = model.block_inputs(SEQUENCE_LENGTH)
    hidden = entering_states(model, sequences)[0]
    for layer in range(layers):
        with model.block(layer) as block:
            weights = {
                module.id.kind: block.get_parameter(f"{module.id.kind}.weight").detach()
                for module in structure.in_layer(layer)
            }
            time_their_layer(watch, block, inputs[layer], hidden, weights)
            hidden = forward_block(block, inputs[layer], hidden, layer=layer)
    return {
        "kurtosis (scipy)": watch.seconds["kurtosis"],
        "quantize for the norms": watch.seconds["quantize"] + watch.seconds["norms"],
        "quantize again per set": SETS * watch.seconds["quantize"],
        "replays": SETS * len(STOPS) * watch.seconds["replay"],
    }


def time_their_layer(
    watch: Stopwatch, block: nn.Module, inputs: BlockInputs, hidden: Tensor, weights: dict[str, Tensor]
) -> None:
    for weight in weights.values():
        with watch.step("kurtosis"):
            scipy.stats.kurtosis(weight.double().numpy().ravel(), fisher=False, bias=True)
    large = max(weight.numel() for weight in weights.values()) > LARGEST_TIMED
    timed = dict(list(weights.items())[:1]) if large else weights
    specs = FEW_CONFIGURATIONS if large else STOPS
    scale = sum(weight.numel() for weight in weights.values()) / sum(weight.numel() for weight in timed.values())
    scale *= len(STOPS) / len(specs)
    quantized, parts = dict(weights), Stopwatch()
    for spec in specs:
        for kind, weight in timed.items():
            with parts.step("quantize"):
                quantized[kind] = package_round_trip(weight, spec)
            with parts.step("norms"):
                (quantized[kind] - weight).norm()
    for name, seconds in parts.seconds.items():
        watch.seconds[name] += seconds * scale
    with watch.step("replay"):
        for sequence in hidden.split(1):
            replay_parts(block, inputs, sequence, quantized)


def package_round_trip(weight: Tensor, spec: QuantSpec) -> Tensor:
    codes, meta = PackageQuantizer.quantize(
        weight, nbits=spec.bits, group_size=spec.group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    meta["compute_dtype"] = torch.float32
    return PackageQuantizer.dequantize(codes, meta)


def replay_parts(block: nn.Module, inputs: BlockInputs, hidden: Tensor, quantized: dict[str, Tensor]) -> None:
    """Mean squared output error of every part of a Llama block, as AutoAWQ's search takes it."""
    calls: dict[str, Any] = {}
    handles = [
        block.get_submodule(path).register_forward_hook(
            lambda _, args, kwargs, __, path=path: calls.__setitem__(path, (args, kwargs)), with_kwargs=True
        )
        for path in LLAMA_PARTS
    ]
    inputs.run(block, hidden)
    for handle in handles:
        handle.remove()
    for path, kinds in LLAMA_PARTS.items():
        part, (args, kwargs) = block.get_submodule(path), calls[path]
        weights = {f"{kind}.weight".strip("."): quantized[f"{path}.{kind}".strip(".")] for kind in kinds}
        outputs = part(*args, **kwargs), torch.func.functional_call(part, weights, args, kwargs)
        expected, found = (output[0] if isinstance(output, tuple) else output for output in outputs)
        (found - expected).float().square().mean().item()


def compare(title: str, path: Path, layers: int, all_layers: int, options: argparse.Namespace, sequences: int) -> None:
    command = ["--ours", str(path), "--layers", str(layers), "--sequences", str(sequences)]
    command = [sys.executable, "-m", "benchmarks.measuring", *command, "--threads", str(options.threads)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    ours, peak = answer["seconds"], answer["peak_bytes"]
    theirs = measure_theirs(path, layers, sequences)
    loss_aware_s = ours.pop(LOSS_AWARE)
    ours_s, theirs_s, scale = sum(ours.values()), sum(theirs.values()), all_layers / layers
    print(f"\n{title}: {layers} of {all_layers} layers, {SETS} sets of {sequences} × {SEQUENCE_LENGTH} tokens")
    for side, steps, mark in (("lmq", ours, ""), ("theirs", theirs, "~")):
        for name, seconds in steps.items():
            print(f"  {side:8}{name:40}{mark + format(seconds, '.2f'):>10} s")
    print(f"  {'lmq':8}{LOSS_AWARE:40}{loss_aware_s:10.2f} s")
    print(f"  these layers    lmq {ours_s:.1f} s, theirs ~{theirs_s:.1f} s, ratio {theirs_s / ours_s:.1f}x")
    print(f"  all layers      lmq ~{ours_s * scale:.0f} s, theirs ~{theirs_s * scale:.0f} s")
    print(f"  peak memory of lmq {peak / 1e6:,.0f} MB above its imports", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="directory of a Llama (default: SmolLM2's shape, random)")
    parser.add_argument("--layers", type=int, default=4, help="layers of it that are measured (default 4)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of 512 tokens per set (default 16)")
    parser.add_argument("--large-sequences", type=int, default=4, help="those of the large block (default 4; 0: none)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    if options.ours:
        before = peak_bytes()
        seconds = measure_ours(options.ours, options.layers, options.sequences)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes() - before}))
        return
    print(f"{len(STOPS)} configurations, float32, {options.threads} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "small"
        if not options.model:
            write_llama(path, SMOLLM2_135M, blocks=options.layers)
        layers = discover(path, weights_sha256="").layers if options.model else SMOLLM2_135M.layers
        title = path.name if options.model else f"{SMOLLM2_135M.name}'s shape"
        compare(title, path, options.layers, layers, options, options.sequences)
        if options.large_sequences:
            path = Path(folder) / "large"
            write_llama(path, LLAMA_2_7B, blocks=1)
            compare(f"{LLAMA_2_7B.name}'s shape", path, 1, LLAMA_2_7B.layers, options, options.large_sequences)


if __name__ == "__main__":
    main()
