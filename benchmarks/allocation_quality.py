"""Perplexity of every strategy at equal bytes: a table of strategy × size for small models.

Run `python -m benchmarks.allocation_quality MODEL_DIR … --calibration TEXT --evaluation TEXT`. Sizes are those of
uniform b4g64, b4g128 and b3g32; every plan but the two boosts has that size or less. `closed` is the share of the
gap between uniform and full precision, in log-perplexity. `b4g32` and `b8g32` stay out of the menu, because a
source stored on a 4-bit grid of 32 is reproduced by them. The validation slice of `auto` is calibration text that
nothing was measured on; evaluation text is only evaluated on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.whole_model import WholeModel
from lmq.budget import Budget, module_sizes
from lmq.calibration import TextSource, bos_prefix, documents, load_tokenizer, pack_tokens, token_stream
from lmq.error_table import ErrorTable
from lmq.evaluation import window_tokens
from lmq.fisher import token_fisher
from lmq.frobenius import frobenius_errors
from lmq.kurtosis import kurtosis
from lmq.perplexity import full_windows
from lmq.quant_spec import STOPS, QuantSpec
from lmq.refine import LocalCosts, Refinement, RefineOptions, refine
from lmq.sensitivity import part_sensitivities
from lmq.sequence_fisher import sequence_loss_changes
from lmq.strategies import Measurements, strategy
from lmq.streaming import StreamedModel
from lmq.structure import ModuleId

MENU = tuple(spec for spec in STOPS if spec.name not in ("b4g32", "b8g32"))
SIZES = ("b4g64", "b4g128", "b3g32")
SENSITIVITY_SPEC = QuantSpec(4, 64)
STRATEGIES: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in ("uniform", "structural", "sensi-boost", "kurt-boost", "mxq")},
    "loss-aware, token-wise": ("loss-aware", {"fisher": "token"}),
    "loss-aware, sequence-wise": ("loss-aware", {"fisher": "sequence"}),
}
"""Label in the table → strategy and its options."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Token ids: what is measured on, what `auto` validates on, and what plans are judged by."""

    calibration: Tensor
    validation: Tensor
    evaluation: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What strategies ask for, and the loss changes [sequences · draws, modules, configurations]."""

    measurements: Measurements
    loss_changes: np.ndarray


def main() -> None:
    options = _arguments()
    print("| model | size of | strategy | bits per weight | perplexity | closed |")
    print("|---|---|---|---:|---:|---:|")
    for model_dir in options.model_dir:
        for row in _model_rows(model_dir, options):
            print(row, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="+", help="directories of models as safetensors")
    parser.add_argument("--calibration", required=True, help="text to measure on")
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences of 512 tokens (default 16)")
    parser.add_argument("--validation-sequences", type=int, default=6, help="the same for auto's slice (default 6)")
    parser.add_argument("--draws", type=int, default=4, help="draws of labels per sequence (default 4)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of auto; 0 leaves it out (default 4)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1024 tokens (default 8)")
    return parser.parse_args()


def _model_rows(model_dir: Path, options: argparse.Namespace) -> Iterator[str]:
    """Table rows of one model, each as soon as it is there."""
    texts = _read_texts(model_dir, options)
    model = WholeModel(model_dir, MENU)
    started_s = time.perf_counter()
    measured = _measure(model, model_dir, texts.calibration, options.draws)
    print(f"<!-- {model_dir.name}: measured in {time.perf_counter() - started_s:.0f} s -->", flush=True)
    full = _evaluate(model, None, texts)
    yield f"| {model_dir.name} | – | full precision | 16 | {math.exp(full):.2f} | 100 % |"
    for size in SIZES:
        budget_bytes = Budget.parse(f"uniform {size}").resolve(model.structure)
        plans = _plans(measured, budget_bytes)
        if options.rounds:
            started_s = time.perf_counter()
            refined = _refine(model, measured, plans, budget_bytes, texts, options.rounds)
            plans["auto"] = _named(model, refined.choice)
            print(
                f"<!-- {model_dir.name} auto at {size}: validation KL {refined.loss:.4f}, uniform "
                f"{refined.uniform_loss:.4f}, {len(refined.tried)} plans in {time.perf_counter() - started_s:.0f} s -->"
            )
        uniform = _evaluate(model, plans["uniform"], texts)
        for name, plan in plans.items():
            loss = uniform if name == "uniform" else _evaluate(model, plan, texts)
            closed = (uniform - loss) / (uniform - full)
            bits = 8 * _size_bytes(model, plan) / model.structure.parameters
            yield f"| {model_dir.name} | {size} | {name} | {bits:.3f} | {math.exp(loss):.2f} | {100 * closed:.1f} % |"


def _read_texts(model_dir: Path, options: argparse.Namespace) -> Texts:
    tokenizer = load_tokenizer(model_dir)
    packed = pack_tokens(
        documents(TextSource(source=options.calibration)),
        tokenizer,
        sequence_length=512,
        sequences=options.sequences + options.validation_sequences,
    )
    prefix = bos_prefix(tokenizer)
    length = 1024 if prefix is None else 1023
    stream = token_stream(documents(TextSource(source=options.evaluation)), tokenizer, options.windows * length)
    windows = window_tokens(stream, full_windows(len(stream), length, length), prefix)
    return Texts(calibration=packed[: options.sequences], validation=packed[options.sequences :], evaluation=windows)


def _measure(model: WholeModel, model_dir: Path, calibration: Tensor, draws: int) -> Measured:
    """Everything that the strategies ask for."""
    modules = model.structure.modules
    token_costs, changes = _fisher(model, calibration, draws)
    tokens_per_sequence = calibration.shape[1] - 1
    costs = 0.5 * np.square(changes).mean(axis=0) / tokens_per_sequence
    frobenius = [frobenius_errors(model.weights[m.id], [model.grids[m.id][spec] for spec in MENU]) for m in modules]
    measurements = Measurements(
        modules=modules,
        menu=MENU,
        kurtosis={module: kurtosis(weight) for module, weight in model.weights.items()},
        sensitivity=_sensitivity(model, model_dir, calibration),
        frobenius=_table(model, np.array(frobenius)),
        fisher=_table(model, token_costs),
        sequence_fisher=_table(model, costs),
    )
    return Measured(measurements=measurements, loss_changes=changes)


def _fisher(model: WholeModel, calibration: Tensor, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Token-wise costs [modules, configurations]; loss changes [sequences · draws, modules, configurations]."""
    modules = model.structure.modules
    token_costs = np.zeros((len(modules), len(MENU)))
    changes = np.zeros((len(calibration), draws, len(modules), len(MENU)))
    generator = torch.Generator().manual_seed(0)
    for number, sequence in enumerate(calibration):
        own_labels, *drawn_labels = model.traces(sequence, draws, generator)
        for row, module in enumerate(modules):
            errors = model.errors[module.id]
            token_costs[row] += [token_fisher(own_labels(module.id), errors[spec]) for spec in MENU]
            for draw, trace_of in enumerate(drawn_labels):
                found = sequence_loss_changes(trace_of(module.id), errors, sequence_length=len(sequence))
                changes[number, draw, row] = [float(found[spec]) for spec in MENU]
    return token_costs, changes.reshape(-1, *changes.shape[2:])


def _table(model: WholeModel, costs: np.ndarray) -> ErrorTable:
    ids = tuple(module.id for module in model.structure.modules)
    return ErrorTable(ids, MENU, costs, module_sizes(model.structure.modules, MENU))


def _sensitivity(model: WholeModel, model_dir: Path, calibration: Tensor) -> dict[ModuleId, float]:
    streamed = StreamedModel.open(model_dir, model.structure)
    hidden, inputs = streamed.embed(calibration), streamed.block_inputs(calibration.shape[1])
    found: dict[ModuleId, float] = {}
    for layer in range(model.structure.layers):
        modules = model.structure.in_layer(layer)
        quantized = {m.id.kind: model.grids[m.id][SENSITIVITY_SPEC].round_trip(model.weights[m.id]) for m in modules}
        with streamed.block(layer) as block, torch.no_grad():
            scores = part_sensitivities(block, inputs[layer], hidden, modules, quantized)
            hidden = torch.cat([inputs[layer].run(block, sequence[None]) for sequence in hidden])
        found |= {module.id: scores[module.part] for module in modules}
    return found


def _plans(measured: Measured, budget_bytes: int) -> dict[str, dict[ModuleId, QuantSpec]]:
    return {
        label: strategy(name, **options).allocate(measured.measurements, budget_bytes).specs
        for label, (name, options) in STRATEGIES.items()
    }


def _refine(
    model: WholeModel,
    measured: Measured,
    plans: Mapping[str, Mapping[ModuleId, QuantSpec]],
    budget_bytes: int,
    texts: Texts,
    rounds: int,
) -> Refinement:
    """`auto`: the plans within the budget, refined by divergence measured on the validation slice."""
    calibration = texts.calibration
    validation_reference, reference = model.reference(texts.validation), model.reference(calibration)
    sizes_bytes = module_sizes(model.structure.modules, MENU)
    rows = np.arange(len(sizes_bytes))

    def measured_loss(choice: np.ndarray) -> float:
        model.quantize(_named(model, choice))
        return model.divergence(texts.validation, validation_reference)

    def local_costs(choice: np.ndarray) -> LocalCosts:
        model.quantize(_named(model, choice))
        slopes = model.divergence_slopes(calibration, reference)
        changes = measured.loss_changes - measured.loss_changes[:, rows, choice][:, :, None]
        curvature = 0.5 * np.square(changes).mean(axis=0) / (calibration.shape[1] - 1)
        return LocalCosts(slopes - slopes[rows, choice][:, None], curvature)

    candidates = {
        name: np.array([MENU.index(plan[module.id]) for module in model.structure.modules])
        for name, plan in plans.items()
        if _size_bytes(model, plan) <= budget_bytes
    }
    return refine(
        candidates,
        sizes_bytes,
        budget_bytes,
        measured_loss=measured_loss,
        local_costs=local_costs,
        options=RefineOptions(rounds=rounds),
    )


def _named(model: WholeModel, choice: np.ndarray) -> dict[ModuleId, QuantSpec]:
    return {module.id: MENU[column] for module, column in zip(model.structure.modules, choice.tolist(), strict=True)}


def _size_bytes(model: WholeModel, plan: Mapping[ModuleId, QuantSpec]) -> int:
    return sum(plan[module.id].size_bytes(module.parameters) for module in model.structure.modules)


def _evaluate(model: WholeModel, plan: Mapping[ModuleId, QuantSpec] | None, texts: Texts) -> float:
    model.quantize(plan)
    return model.negative_log_likelihood(texts.evaluation)


if __name__ == "__main__":
    main()
