"""A small language model held whole in memory, with its matrices quantized one way and another.

For benchmarks on models that fit many times over: captures by hooks, loss and loss gradient by the model itself.
Products are bfloat16 where the processor is fast at it, except in `negative_log_likelihood`, which is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmq.discovery import discover
from lmq.fisher import ModuleTrace, fast_matmul_dtype
from lmq.frobenius import fit_grids
from lmq.grid import Grid
from lmq.quant_spec import QuantSpec
from lmq.quantizers.hqq import Hqq
from lmq.structure import ModuleId

CPU = torch.device("cpu")


class WholeModel:
    """A model, the grid of every matrix under every configuration of the menu, and the errors these make."""

    def __init__(self, model_dir: Path, menu: tuple[QuantSpec, ...]):
        self.structure = discover(model_dir, weights_sha256="0")
        self.menu = menu
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval().requires_grad_(False)
        self.linears: dict[ModuleId, nn.Module] = {
            module.id: self.model.get_submodule(self.structure.path(module.id)) for module in self.structure.modules
        }
        self.weights: dict[ModuleId, Tensor] = {
            module: linear.get_parameter("weight").detach() for module, linear in self.linears.items()
        }
        self.grids: dict[ModuleId, dict[QuantSpec, Grid]] = {}
        self.errors: dict[ModuleId, dict[QuantSpec, Tensor]] = {}
        for module, weight in self.weights.items():
            self.grids[module] = fit_grids(weight, menu, Hqq(), str(module))
            self.errors[module] = {
                spec: (grid.round_trip(weight) - weight).to(fast_matmul_dtype(CPU))
                for spec, grid in self.grids[module].items()
            }

    def quantize(self, choice: Mapping[ModuleId, QuantSpec] | None) -> None:
        """Put the weights of a choice into the model; None is full precision."""
        for module, linear in self.linears.items():
            weight = self.weights[module]
            quantized = weight if choice is None else self.grids[module][choice[module]].round_trip(weight)
            linear.weight = nn.Parameter(quantized, requires_grad=False)

    @torch.no_grad()
    def negative_log_likelihood(self, windows: Tensor) -> float:
        """Mean over all predicted tokens of windows [windows, tokens], nats, in float32."""
        losses = [
            nn.functional.cross_entropy(self.model(window[None]).logits[0, :-1].float(), window[1:].long())
            for window in windows.long()
        ]
        return float(torch.stack(losses).double().mean())

    def log_probabilities(self, sequence: Tensor) -> Tensor:
        """Predictions [tokens − 1, vocabulary] float32 for one sequence, the last position left out."""
        with torch.autocast("cpu", dtype=fast_matmul_dtype(CPU), enabled=fast_matmul_dtype(CPU) != torch.float32):
            logits = self.model(sequence[None].long()).logits[0, :-1]
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def reference(self, sequences: Tensor) -> list[Tensor]:
        """Full-precision predictions of sequences [sequences, tokens], float16, to measure divergence from."""
        self.quantize(None)
        return [self.log_probabilities(sequence).half() for sequence in sequences]

    @torch.no_grad()
    def divergence(self, sequences: Tensor, reference: list[Tensor]) -> float:
        """Mean KL per token of the model as it is now from the reference, nats."""
        sums = [self._divergence(*pair).double() for pair in zip(sequences, reference, strict=True)]
        return float(torch.stack(sums).sum()) / (sequences.shape[0] * (sequences.shape[1] - 1))

    def divergence_slopes(self, sequences: Tensor, reference: list[Tensor]) -> np.ndarray:
        """⟨∇_W divergence, E⟩ of the model as it is now, [modules, configurations], nats per token."""
        for linear in self.linears.values():
            linear.get_parameter("weight").requires_grad_(True)
        with torch.enable_grad():
            for pair in zip(sequences, reference, strict=True):
                self._divergence(*pair).backward()
        slopes = []
        for module, linear in self.linears.items():
            gradient = linear.get_parameter("weight").grad
            assert gradient is not None
            slopes.append([float((gradient * error).sum()) for error in self.errors[module].values()])
        self.model.requires_grad_(False)
        for linear in self.linears.values():
            linear.get_parameter("weight").grad = None
        return np.array(slopes) / (sequences.shape[0] * (sequences.shape[1] - 1))

    def _divergence(self, sequence: Tensor, reference: Tensor) -> Tensor:
        expected = reference.float()
        return (expected.exp() * (expected - self.log_probabilities(sequence))).sum()

    def traces(
        self, sequence: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[Callable[[ModuleId], ModuleTrace]]:
        """Traces of the loss for the text's own labels, then for each draw of labels from the model's predictions."""
        with self._watch() as seen, torch.enable_grad():
            predictions = self.log_probabilities(sequence)
            drawn = torch.multinomial(predictions.detach().exp(), draws, replacement=True, generator=generator)
            outputs = [output for _, output in seen.values()]
            for labels in (sequence[1:].long(), *drawn.unbind(1)):
                loss = nn.functional.nll_loss(predictions, labels, reduction="sum")
                gradients = dict(zip(seen, torch.autograd.grad(loss, outputs, retain_graph=True), strict=True))
                yield partial(_trace, seen, gradients)

    @contextmanager
    def _watch(self) -> Iterator[dict[ModuleId, tuple[Tensor, Tensor]]]:
        """Inputs [tokens, in_features] and outputs of every module in the next forward pass."""
        seen: dict[ModuleId, tuple[Tensor, Tensor]] = {}

        def keep(module: ModuleId) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen[module] = (args[0].detach()[0].to(fast_matmul_dtype(CPU)), output)

            return hook

        embedding = self.model.get_input_embeddings()
        handles = [linear.register_forward_hook(keep(module)) for module, linear in self.linears.items()]
        handles.append(embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_(True)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _trace(
    seen: Mapping[ModuleId, tuple[Tensor, Tensor]], gradients: Mapping[ModuleId, Tensor], module: ModuleId
) -> ModuleTrace:
    inputs, _ = seen[module]
    return ModuleTrace(inputs, gradients[module][0])
