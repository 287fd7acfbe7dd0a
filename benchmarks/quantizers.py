"""Divergence of every quantizer at the same bytes, and of plans made with its codes, for small models.

Run `python -m benchmarks.quantizers MODEL … --calibration TEXT --evaluation TEXT --work DIR`. Embedding, head and norms
stay. First every configuration of `--uniform` for all block matrices, so that nothing but the codes differs; then
`--menu` is given out within each of `--budgets` (bits per weight) by `loss-aware` on the codes of each quantizer;
with `--learn 60` rounding is learned in 60 steps after each of these, with `--polish 60` each plan is polished in 60
steps after that. With `--equalize` all of that is done on a copy of the
model with rescaled channels, and compared with the model as it was; with `--for ENGINE` zeros, menu, plans and bits are
those of a target's file. Second moments and costs are those of a run: states and gradients of the unquantized model,
with labels that it draws itself. Models are judged in float32.

Grids, costs and what is learned are kept in `--work`, one folder per model and quantizer, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.judge import Judge, bits_per_weight, print_header, print_row, read_tokens
from benchmarks.llama_cpp_codes import LlamaCpp
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.frontier import within_target
from lmq.allocation.strategies import Measurements, strategy
from lmq.allocation.targets import TARGETS, Target, target_named
from lmq.checkpoint.equalized import write_equalized
from lmq.checkpoint.learned_rounding import RoundingSchedule, channel_importance, learn_rounding
from lmq.checkpoint.polish import Polish, PolishSchedule
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import cost_row
from lmq.measurement.grids import Allocation, LayerGrids, load_grids, quantize_modules, save_grids
from lmq.measurement.quantized_model import GridsOfLayer, QuantizedPoint
from lmq.measurement.quantizer_moments import fisher_moments_of
from lmq.measurement.replay import backward_block, forward_block
from lmq.measurement.sequence_fisher import (
    pooled_costs,
    sampled_loss_gradient,
    sequence_fisher,
    sequence_loss_changes,
    token_cost,
)
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.numerics import fast_matmul_dtype, fast_products
from lmq.quantizers import QUANTIZERS, CalibratedQuantizer, Quantizer, quantizer

SEQUENCE_LENGTH, WINDOW = 512, 1024
COSTS_FILE = "costs.json"
IMPORTANCE_FILE = "importance.safetensors"


def main() -> None:
    options = _arguments()
    print_header("quantizer")
    for source in options.model:
        _table(Path(source), options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="directories of unquantized models")
    parser.add_argument("--calibration", required=True, type=Path, help="text that the quantizers see")
    parser.add_argument("--evaluation", required=True, type=Path, help="text to evaluate on")
    parser.add_argument("--work", required=True, type=Path, help="folder for grids and costs")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--draws", type=int, default=2, help="draws of labels per sequence (default 2)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens (default 8)")
    parser.add_argument("--uniform", default="b3g64,b4g64", help="for all matrices (default b3g64,b4g64)")
    parser.add_argument("--menu", default="", help="what plans choose from (default: what is measured uniform)")
    names = [name for name in QUANTIZERS if name != "hqq-package"]
    parser.add_argument("--quantizers", default=",".join(names), help=f"default {','.join(names)}; llama.cpp too")
    parser.add_argument("--budgets", default="", help="bits per weight of plans, as in 3.254,4.254")
    parser.add_argument("--learn", type=int, default=0, help="steps of learned rounding of a layer (default 0)")
    parser.add_argument("--polish", type=int, default=0, help="steps of polish after that (default 0)")
    parser.add_argument("--for", dest="target", type=target_named, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--equalize", action="store_true", help="rescale channels first, on the calibration text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bos", action="store_true", help="begin every sequence and window with the model's BOS")
    return parser.parse_args()


def _table(directory: Path, options: argparse.Namespace) -> None:
    model = StreamedModel.open(directory, discover(directory), device=options.device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    bos = tokenizer.bos_token_id if options.bos else None
    to_polish_on = options.polish * PolishSchedule.sequences_per_step
    read = read_tokens(tokenizer, options.calibration, options.sequences + to_polish_on, SEQUENCE_LENGTH, bos)
    tokens, further = read[: options.sequences], read[options.sequences :]
    judge = Judge.of(model, read_tokens(tokenizer, options.evaluation, options.windows, WINDOW, bos))
    print_row(directory.name, "full precision", "", 16, judge.scores(None))
    if options.equalize:
        copy = options.work / f"{directory.name}-equalized"
        if not copy.exists():
            write_equalized(directory, model.structure, tokens, copy, device=options.device)
        directory, model = copy, StreamedModel.open(copy, model.structure, device=options.device)
        judge = replace(judge, model=model)  # against the states of the model as it was
    uniform = [QuantSpec.parse(name) for name in options.uniform.split(",")]
    menu = [QuantSpec.parse(name) for name in (options.menu or options.uniform).split(",")]
    target: Target | None = options.target
    if target is not None and not options.menu:
        menu = list(target.usual_menu(model.structure.modules))
    what_for = "" if target is None else f"-for-{target.name}"
    folders = {name: options.work / directory.name / f"{name}{what_for}" for name in options.quantizers.split(",")}
    missing = {name: folder for name, folder in folders.items() if not (folder / COSTS_FILE).exists()}
    if missing:
        measure(directory, model, tokens, options.draws, sorted({*uniform, *menu}), missing, target)
    for name, folder in folders.items():
        grids = grids_in(folder)
        whole = target is not None and bool(target.integer_zeros)
        schedule = RoundingSchedule(steps=options.learn, integer_zeros=whole) if options.learn else None
        for spec in uniform:
            same = {module.id: spec for module in model.structure.modules}
            bits = bits_per_weight(model, same, target)
            print_row(directory.name, name, spec.name, bits, judge.scores(grids, same))
            if schedule:
                learned = _learned(model, folder, same, tokens, schedule, f"{spec}, learned {options.learn}")
                what = f"{spec}, learned {options.learn} steps"
                print_row(directory.name, name, what, bits, judge.scores(learned, same))
        for budget in map(float, filter(None, options.budgets.split(","))):
            given = plan_within(model, folder, menu, budget, target)
            what, bits = f"given out within {budget:g}", bits_per_weight(model, given, target)
            print_row(directory.name, name, what, bits, judge.scores(grids, given))
            start = grids
            if schedule:
                what = f"{what}, learned {options.learn} steps"
                start = _learned(model, folder, given, tokens, schedule, what)
                print_row(directory.name, name, what, bits, judge.scores(start, given))
            if options.polish:
                polished = f"{what}, polished {options.polish} steps"
                with _polished(model, start, given, further, options.polish, integer_zeros=whole) as tuned:
                    print_row(directory.name, name, polished, bits, judge.scores(tuned, given))


def measure(
    directory: Path,
    model: StreamedModel,
    tokens: Tensor,
    draws: int,
    menu: Sequence[QuantSpec],
    folders: Mapping[str, Path],
    target: Target | None = None,
) -> None:
    """Keep grids, rows of costs and the importance of channels of every layer, in a folder per quantizer.

    One pass forward and one back: what a block's modules see and the gradients at their outputs serve every quantizer.
    """
    layers, inputs = model.structure.layers, model.block_inputs(tokens.shape[1])
    hidden = [model.embed(tokens)]
    for layer in range(layers):
        with model.block(layer) as block:
            hidden.append(forward_block(block, inputs[layer], hidden[-1], layer=layer))
    with fast_products(model.device):
        gradient = sampled_loss_gradient(model, hidden.pop(), draws=draws, seed=0)
    importance = {}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for layer in reversed(range(layers)):
        entering = hidden.pop()
        importance[str(layer)] = channel_importance(gradient)
        kinds = [module.id.kind for module in model.structure.in_layer(layer)]
        with model.block(layer) as block, fast_products(model.device):
            dtype = fast_matmul_dtype(model.device)
            traces = trace_modules(block, inputs[layer], entering, gradient, kinds, dtype)
            if layer:
                gradient = backward_block(block, inputs[layer], entering, gradient, layer=layer)
        by_kind = load_layer_weights(directory, model.structure, layer)
        weights = {module.id: by_kind[module.id.kind].to(model.device) for module in model.structure.in_layer(layer)}
        fisher = {module: fisher_moments_of(traces[module.kind]) for module in weights}
        for name, folder in folders.items():
            grids = _quantize(weights, menu, _quantizer(name, target), traces, fisher)
            save_grids(folder / f"{layer}.safetensors", grids)
            rows[name] += _costs(model, weights, grids, traces, fisher)
    for name, folder in folders.items():
        save_file(importance, folder / IMPORTANCE_FILE)
        (folder / COSTS_FILE).write_text(json.dumps(rows[name]))


def _quantizer(name: str, target: Target | None) -> Quantizer:
    if name == LlamaCpp.name:
        return LlamaCpp()
    return quantizer(name, integer_zeros=target.integer_zeros) if target is not None else quantizer(name)


def _quantize(
    weights: Mapping[ModuleId, Tensor],
    menu: Sequence[QuantSpec],
    chosen: Quantizer,
    traces: Mapping[str, ModuleTrace],
    fisher: Mapping[ModuleId, UpperTriangle],
) -> LayerGrids:
    if not isinstance(chosen, CalibratedQuantizer):
        return quantize_modules(weights, menu, chosen)
    if chosen.fisher_weighted:
        return quantize_modules(weights, menu, chosen, fisher)
    plain = {}
    for module in weights:
        inputs = traces[module.kind].inputs
        plain[module] = UpperTriangle.zeros(inputs.shape[1], inputs.device)
        plain[module].add_products(inputs, torch.ones(len(inputs), device=inputs.device))
    return quantize_modules(weights, menu, chosen, plain)


def _costs(
    model: StreamedModel,
    weights: Mapping[ModuleId, Tensor],
    grids: LayerGrids,
    traces: Mapping[str, ModuleTrace],
    fisher: Mapping[ModuleId, UpperTriangle],
) -> Iterator[dict[str, Any]]:
    """Rows of the loss-aware cost of a layer, `fisher` being the second moments."""
    for info in (module for module in model.structure.modules if module.id in weights):
        weight, trace = weights[info.id], traces[info.id.kind]
        errors = {spec: (grid.round_trip(weight) - weight).to(trace.inputs) for spec, grid in grids[info.id].items()}
        by_sequence = {
            spec: sequence_fisher(changes, tokens_per_sequence=SEQUENCE_LENGTH - 1)
            for spec, changes in sequence_loss_changes(trace, errors, sequence_length=SEQUENCE_LENGTH).items()
        }
        moments = fisher[info.id].matrix()
        by_token = {spec: token_cost(error, moments) for spec, error in errors.items()}
        for spec, cost in pooled_costs(by_sequence, by_token).items():
            yield cost_row(info, spec, fisher=cost)


def grids_in(folder: Path) -> GridsOfLayer:
    return lru_cache(maxsize=1)(lambda layer: load_grids(folder / f"{layer}.safetensors"))


def plan_within(
    model: StreamedModel, folder: Path, menu: Sequence[QuantSpec], bits: float, target: Target | None = None
) -> Allocation:
    """What `loss-aware` gives every module within so many bits per weight, of a target's file where there is one."""
    rows = [row for row in json.loads((folder / COSTS_FILE).read_text()) if _spec(row) in menu]
    costs = {"sequence_fisher": ErrorTable.from_rows(rows, "fisher")}
    measurements = Measurements(modules=model.structure.modules, menu=tuple(menu), costs=costs)
    if target is not None:
        measurements = within_target(measurements, target)
    weights = sum(module.parameters for module in model.structure.modules)
    return strategy("loss-aware").allocate(measurements, int(bits * weights / 8)).specs


def _spec(row: Mapping[str, Any]) -> QuantSpec:
    return QuantSpec.from_row(row)


def _learned(
    model: StreamedModel,
    measured: Path,
    allocation: Allocation,
    tokens: Tensor,
    schedule: RoundingSchedule,
    name: str,
) -> GridsOfLayer:
    """The measured grids of an allocation after learned rounding on states of the unquantized model, kept by name."""
    grids, importance, folder = grids_in(measured), load_file(measured / IMPORTANCE_FILE), measured / name
    folder.mkdir(exist_ok=True)
    hidden, inputs = model.embed(tokens), model.block_inputs(tokens.shape[1])
    for layer in range(model.structure.layers):
        file = folder / f"{layer}.safetensors"
        with model.block(layer) as block:
            leaving = forward_block(block, inputs[layer], hidden, layer=layer)
            if not file.exists():
                states = hidden, leaving, importance[str(layer)]
                found, _ = learn_rounding(block, inputs[layer], *states, grids(layer), allocation, schedule)
                save_grids(file, found)
        hidden = leaving
    return grids_in(folder)


@contextmanager
def _polished(
    model: StreamedModel,
    grids: GridsOfLayer,
    allocation: Allocation,
    tokens: Tensor,
    steps: int,
    *,
    integer_zeros: bool,
) -> Iterator[GridsOfLayer]:
    """The grids of an allocation after so many steps of polish on `tokens`, as stored."""
    with tempfile.TemporaryDirectory() as folder:
        schedule = PolishSchedule(steps=steps, integer_zeros=integer_zeros)
        polish = Polish(model, allocation, Path(folder), schedule)
        polish.start(grids)
        reference = QuantizedPoint(model, lambda _: {}, matmul_dtype=torch.float32).last_states(tokens)
        for _ in polish.run(0, steps, tokens, reference):
            pass
        yield polish.stored


if __name__ == "__main__":
    main()
