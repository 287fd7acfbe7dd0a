"""Divergence of every quantizer at the same bytes: a table of quantizer × configuration for small models.

Run `python -m benchmarks.quantizers MODEL … --calibration TEXT --evaluation TEXT`. One configuration for all block
matrices, so that nothing but the codes differs; embedding, head and norms stay. Second moments are those of a run:
states and gradients of the unquantized model, with labels that it draws itself. Everything is computed in float32.

With `--budgets 3.254,4.254` (bits per weight) the menu is also given out within each of them, for the least sum of
½ tr(E H Eᵀ), the Fisher cost of the last quantizer's own errors; with `--polish 60` each plan is polished in 60 steps.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lmq.allocation import solve
from lmq.allocation.budget import module_sizes
from lmq.checkpoint.polish import Polish, PolishSchedule
from lmq.formats.spec import QuantSpec
from lmq.measurement.divergence import divergence
from lmq.measurement.grids import Allocation, LayerGrids, quantize_modules
from lmq.measurement.quantized_model import GridsOfLayer, QuantizedPoint
from lmq.measurement.quantizer_moments import fisher_moments, input_moments
from lmq.measurement.replay import backward_block, forward_block
from lmq.measurement.sequence_fisher import sampled_loss_gradient
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel, load_layer_weights
from lmq.quantizers import QUANTIZERS, CalibratedQuantizer, Quantizer, quantizer

SEQUENCE_LENGTH, WINDOW = 512, 1024
Moments = Sequence[Mapping[str, UpperTriangle]]
"""Second moments of every module by layer and kind."""


def main() -> None:
    options = _arguments()
    print("| model | quantizer | configuration | bits per weight | perplexity | KL | top-1 |")
    print("|---|---|---|---:|---:|---:|---:|")
    for source in options.model:
        _table(Path(source), options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="directories of unquantized models")
    parser.add_argument("--calibration", required=True, type=Path, help="text that the quantizers see")
    parser.add_argument("--evaluation", required=True, type=Path, help="text to evaluate on")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--draws", type=int, default=1, help="draws of labels per sequence (default 1)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens (default 8)")
    parser.add_argument("--menu", default="b3g64,b4g64", help="configurations (default b3g64,b4g64)")
    names = [name for name in QUANTIZERS if name != "hqq-package"]
    parser.add_argument("--quantizers", default=",".join(names), help=f"default {','.join(names)}")
    parser.add_argument("--budgets", default="", help="bits per weight to give the menu out within, as in 3.254,4.254")
    parser.add_argument("--polish", type=int, default=0, help="steps of polish after that (default 0)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bos", action="store_true", help="begin every sequence and window with the model's BOS")
    return parser.parse_args()


def _table(directory: Path, options: argparse.Namespace) -> None:
    model = StreamedModel.open(directory, discover(directory), device=options.device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    bos = tokenizer.bos_token_id if options.bos else None
    to_polish_on = options.polish * PolishSchedule.sequences_per_step
    read = _read(tokenizer, options.calibration, options.sequences + to_polish_on, SEQUENCE_LENGTH, bos)
    tokens, further = read[: options.sequences], read[options.sequences :]
    judge = _Judge.of(model, _read(tokenizer, options.evaluation, options.windows, WINDOW, bos))
    _row(directory.name, "full precision", "", 16, judge.scores(None))
    menu = [QuantSpec.parse(name) for name in options.menu.split(",")]
    quantizers = [quantizer(name) for name in options.quantizers.split(",")]
    fisher, plain = _measure(model, tokens, options.draws)
    for chosen in quantizers:
        moments = None
        if isinstance(chosen, CalibratedQuantizer):
            moments = fisher if chosen.fisher_weighted else plain
        grids = [_quantize(directory, model, layer, menu, chosen, moments) for layer in range(model.structure.layers)]
        for spec in menu:
            same = {module.id: spec for module in model.structure.modules}
            _row(directory.name, chosen.name, spec.name, _bits(model, same), judge.scores(grids.__getitem__, same))
    if not options.budgets:
        return
    costs = _costs(directory, model, menu, grids, fisher)
    sizes = module_sizes(model.structure.modules, menu)
    for bits in map(float, options.budgets.split(",")):
        solution = solve(costs, sizes, int(bits * sum(m.parameters for m in model.structure.modules) / 8))
        given = {
            module.id: menu[column] for module, column in zip(model.structure.modules, solution.choice, strict=True)
        }
        what = f"given out within {bits:g}"
        _row(directory.name, chosen.name, what, _bits(model, given), judge.scores(grids.__getitem__, given))
        if options.polish:
            polished = f"{what}, polished {options.polish} steps"
            with _polished(model, grids, given, further, options.polish) as tuned:
                _row(directory.name, chosen.name, polished, _bits(model, given), judge.scores(tuned, given))


def _read(tokenizer: AutoTokenizer, path: Path, rows: int, length: int, bos: int | None) -> Tensor:
    """The first tokens of a text, int64 [rows, length], each row behind BOS where there is one."""
    ids = tokenizer(path.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if bos is None:
        return ids[: rows * length].view(rows, length)
    return torch.cat([torch.full((rows, 1), bos), ids[: rows * (length - 1)].view(rows, -1)], dim=1)


def _measure(model: StreamedModel, tokens: Tensor, draws: int) -> tuple[Moments, Moments]:
    """Fisher-weighted and plain second moments of every module."""
    layers, inputs = model.structure.layers, model.block_inputs(tokens.shape[1])
    hidden = [model.embed(tokens)]
    for layer in range(layers):
        with model.block(layer) as block:
            hidden.append(forward_block(block, inputs[layer], hidden[-1], layer=layer))
    gradient = sampled_loss_gradient(model, hidden.pop(), draws=draws, seed=0)
    fisher: list[Mapping[str, UpperTriangle]] = []
    plain: list[Mapping[str, UpperTriangle]] = []
    for layer in reversed(range(layers)):
        kinds = [module.id.kind for module in model.structure.in_layer(layer)]
        entering = hidden.pop()
        with model.block(layer) as block:
            fisher.append(fisher_moments(block, inputs[layer], entering, gradient, kinds))
            plain.append(input_moments(block, inputs[layer], entering, kinds))
            if layer:
                gradient = backward_block(block, inputs[layer], entering, gradient, layer=layer)
    return fisher[::-1], plain[::-1]


def _quantize(
    directory: Path,
    model: StreamedModel,
    layer: int,
    menu: Sequence[QuantSpec],
    chosen: Quantizer,
    moments: Moments | None,
) -> LayerGrids:
    by_kind = load_layer_weights(directory, model.structure, layer)
    weights = {module.id: by_kind[module.id.kind].to(model.device) for module in model.structure.in_layer(layer)}
    of_layer = None if moments is None else {module: moments[layer][module.kind] for module in weights}
    return quantize_modules(weights, menu, chosen, of_layer)


def _costs(
    directory: Path, model: StreamedModel, menu: Sequence[QuantSpec], grids: Sequence[LayerGrids], moments: Moments
) -> np.ndarray:
    """½ tr(E H Eᵀ) of every module and configuration in nats per token, float64 [modules, configurations]."""
    rows = []
    for layer in range(model.structure.layers):
        by_kind = load_layer_weights(directory, model.structure, layer)
        for module in model.structure.in_layer(layer):
            weight = by_kind[module.id.kind].to(model.device)
            matrix = moments[layer][module.id.kind].matrix()
            errors = (grids[layer][module.id][spec].round_trip(weight) - weight for spec in menu)
            rows.append([0.5 * float(((error @ matrix) * error).sum(dtype=torch.float64)) for error in errors])
    return np.array(rows)


@contextmanager
def _polished(
    model: StreamedModel, grids: Sequence[LayerGrids], allocation: Allocation, tokens: Tensor, steps: int
) -> Iterator[GridsOfLayer]:
    """The grids of an allocation after so many steps of polish on `tokens`, as stored."""
    with tempfile.TemporaryDirectory() as folder:
        polish = Polish(model, allocation, Path(folder), PolishSchedule(steps=steps))
        polish.start(grids.__getitem__)
        reference = QuantizedPoint(model, lambda _: {}, matmul_dtype=torch.float32).last_states(tokens)
        for _ in polish.run(0, steps, tokens, reference):
            pass
        yield polish.stored


def _bits(model: StreamedModel, allocation: Allocation) -> float:
    modules = model.structure.modules
    size_bytes = sum(allocation[module.id].size_bytes(module.parameters) for module in modules)
    return 8 * size_bytes / sum(module.parameters for module in modules)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Compares a quantized model with the unquantized one on windows of tokens [windows, window]."""

    model: StreamedModel
    tokens: Tensor
    reference: Tensor

    @classmethod
    def of(cls, model: StreamedModel, tokens: Tensor) -> _Judge:
        """With the states that leave the unquantized model's last block."""
        reference = QuantizedPoint(model, lambda _: {}, matmul_dtype=torch.float32).last_states(tokens)
        return cls(model=model, tokens=tokens, reference=reference)

    @torch.no_grad()
    def scores(self, grids: GridsOfLayer | None, allocation: Allocation | None = None) -> tuple[float, float, float]:
        """Perplexity, mean KL per token in nats, share of equal most likely tokens."""
        states = self.reference
        if grids is not None:
            states = QuantizedPoint(self.model, grids, matmul_dtype=torch.float32).last_states(self.tokens, allocation)
        targets = self.tokens[:, 1:].flatten().to(self.model.device)
        loss = apart = alike = 0.0
        step = self.model.tokens_at_once
        pairs = zip(*(part[:, :-1].flatten(0, 1).split(step) for part in (self.reference, states)), strict=True)
        for (expected, found), target in zip(
            ([self.model.head_logits(part).float().log_softmax(-1) for part in pair] for pair in pairs),
            targets.split(step),
            strict=True,
        ):
            loss -= float(found.gather(1, target[:, None]).double().sum())
            apart += float(divergence(expected, found).double().sum())
            alike += float((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens = len(targets)
        return math.exp(loss / tokens), apart / tokens, alike / tokens


def _row(model: str, name: str, spec: str, bits: float, scores: tuple[float, float, float]) -> None:
    perplexity, apart, alike = scores
    print(f"| {model} | {name} | {spec} | {bits:.4g} | {perplexity:.2f} | {apart:.4f} | {alike:.3f} |", flush=True)


if __name__ == "__main__":
    main()
