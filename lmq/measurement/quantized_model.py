"""A model quantized one way and another, without writing checkpoints: how far its predictions move, and why.

The model is streamed block by block. Each block's weights are rounded to the grids of an allocation as it is loaded,
so that trying an allocation costs one pass over the model; the gradient of the divergence costs one more, backwards.
The full-precision model's predictions are kept as the states that leave its last block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation
from lmq.model.block_inputs import BlockInputs
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.numerics import fast_products, require_finite


class RoundedWeight(Protocol):
    """A matrix in one configuration: a `Grid`, or what stands in its place."""

    def to(self, device: torch.device) -> RoundedWeight:
        """The same on another device."""
        ...

    def round_trip(self, weight: Tensor) -> Tensor:
        """The weight [out_features, in_features] in this configuration."""
        ...


GridsOfLayer = Callable[[int], Mapping[ModuleId, Mapping[QuantSpec, RoundedWeight]]]
"""Grids of a layer's modules under every configuration of the menu."""

ModuleProducts = Callable[[Tensor, Tensor, Mapping[QuantSpec, RoundedWeight], QuantSpec], list[float]]
"""Inner products of a weight's gradient with changes, from the gradient, W, its grids and the chosen configuration."""

_STATES_AT_ONCE = 1 << 28
"""Values of entering states held at a time on the way back: 1 GiB in float32, whatever the model."""


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """Gradients by a layer's quantized weights, and the unquantized ones: float32 [out_features, in_features] each."""

    number: int
    gradients: Mapping[ModuleId, Tensor]
    weights: Mapping[ModuleId, Tensor]


class QuantizedPoint:
    """Runs a model with the weights of an allocation, over token ids [sequences, sequence_length] or images [images,
    channels, height, width], of which each is a sequence.

    Products are taken in `matmul_dtype`: unless given, bfloat16 where the processor is fast at it. Compare only
    what was run with the same.
    """

    def __init__(self, model: StreamedModel, grids: GridsOfLayer, *, matmul_dtype: torch.dtype | None = None):
        self._model = model
        self._grids = grids
        self._matmul_dtype = matmul_dtype

    @torch.no_grad()
    def last_states(self, token_ids: Tensor, allocation: Allocation | None = None) -> Tensor:
        """States that leave the last block, float32 [sequences, sequence_length, hidden]; None: full precision.

        Raises NotFiniteError naming the layer.
        """
        return self._entering_states(token_ids, allocation, keep_all=False)[-1]

    def divergences(self, token_ids: Tensor, reference_states: Tensor, allocation: Allocation) -> Tensor:
        """Mean KL(p ‖ p_choice) per token of each sequence in nats, float64 [sequences].

        The last position of a sequence predicts nothing.
        """
        return self._divergences([self.last_states(token_ids, allocation)], reference_states)[0]

    @torch.no_grad()
    def losses(self, token_ids: Tensor, allocation: Allocation | None = None) -> Tensor:
        """Mean next-token loss of each sequence in nats, float64 [sequences]; None: full precision."""
        loss = self._model.loss
        states = self._model.split(loss.predicting(self.last_states(token_ids, allocation)))
        targets = loss.targets(token_ids).to(self._model.device).split([len(piece) for piece in states])
        found = [
            -self._predictions(piece).gather(1, target[:, None])[:, 0].double()
            for piece, target in zip(states, targets, strict=True)
        ]
        return torch.cat(found).view(len(token_ids), -1).mean(dim=1).cpu()

    @torch.no_grad()
    def divergences_alone(
        self, layer: int, entering: Tensor, reference_states: Tensor, pairs: Sequence[tuple[ModuleId, QuantSpec]]
    ) -> Tensor:
        """KL of the model with one module of a layer quantized, all others at full precision, exactly.

        `entering` [sequences, sequence_length, hidden] are the full-precision states that enter the layer,
        `reference_states` those that leave the last block. Float64 [pairs, sequences], mean nats per token of each
        sequence. Every block from the layer on is loaded once and run for all pairs. Raises NotFiniteError.
        """
        inputs = self._model.block_inputs(entering.shape[1])
        states: list[Tensor] = []
        with self._block(layer, None) as (block, _), self._autocast():
            grids = self._grids(layer)
            for module, spec in pairs:
                linear = block.get_submodule(module.kind)
                weight = linear.get_parameter("weight")
                linear.weight = nn.Parameter(grids[module][spec].to(self._model.device).round_trip(weight.detach()))
                states.append(self._run(block, inputs[layer], entering.clone(), layer))
                linear.weight = weight
        for later in range(layer + 1, self._model.structure.layers):
            with self._block(later, None) as (block, _), self._autocast():
                for changed in states:
                    self._run(block, inputs[later], changed, later)
        return self._divergences(states, reference_states)

    def slopes(
        self, token_ids: Tensor, reference_states: Tensor, allocation: Allocation, menu: Sequence[QuantSpec]
    ) -> np.ndarray:
        """⟨∇_W KL(p ‖ p_choice), Ŵ_c − Ŵ_choice⟩: float64 [modules, configurations], nats per token, model order.

        What replacing one module's configuration does to the divergence, to first order. Raises NotFiniteError
        naming the layer.
        """
        at_once = self._sequences_at_once(reference_states.shape[1])
        pairs = zip(token_ids.split(at_once), reference_states.split(at_once), strict=True)
        sums = [
            self._gradient_products(
                token_ids,
                allocation,
                functools.partial(self._divergence_gradient, reference_states=reference, divergences=[]),
                functools.partial(_slopes, menu=menu),
            )
            for token_ids, reference in pairs
        ]
        return np.sum(sums, axis=0) / len(self._model.loss.predicting(reference_states[..., :1]))

    def delta_losses(self, token_ids: Tensor, allocation: Allocation, labels: Tensor | None = None) -> np.ndarray:
        """|⟨∇_Ŵ L, W − Ŵ⟩| of the loss L, gradient at the quantized point; `labels` are those of images.

        Float64 [modules] in model order, nats per token: to first order what putting one module back to full precision
        does to the loss, as Intel AutoRound's choice of schemes takes it. Raises NotFiniteError naming the layer.
        """
        given = token_ids if labels is None else labels
        targets = self._model.loss.targets(given)
        at_once = self._sequences_at_once(self._sequence_length(token_ids))
        pieces = token_ids.split(at_once)
        gradients = [functools.partial(self._loss_gradient, given=piece) for piece in given.split(at_once)]
        sums = [
            self._gradient_products(piece, allocation, gradient, _way_back)
            for piece, gradient in zip(pieces, gradients, strict=True)
        ]
        return np.abs(np.sum(sums, axis=0))[:, 0] / len(targets)

    def _sequence_length(self, inputs: Tensor) -> int:
        """States of a sequence: its tokens, or the patches of an image."""
        return self._model.embed(inputs[:1]).shape[1]

    def _sequences_at_once(self, sequence_length: int) -> int:
        structure = self._model.structure
        return max(1, _STATES_AT_ONCE // (structure.layers * sequence_length * structure.hidden_size))

    def _gradient_products(
        self,
        token_ids: Tensor,
        allocation: Allocation,
        last_gradient: Callable[[Tensor], Tensor],
        products: ModuleProducts,
    ) -> np.ndarray:
        """`products` of every module at the quantized point, [modules, products], in model order.

        `last_gradient` makes the gradient at the states that leave the last block from these.
        """
        found: dict[ModuleId, list[float]] = {}
        for layer in self.weight_gradients(token_ids, allocation, last_gradient):
            grids = self._grids(layer.number)
            for module, gradient in layer.gradients.items():
                found[module] = products(gradient, layer.weights[module], grids[module], allocation[module])
        return np.array([found[module.id] for module in self._model.structure.modules])

    def divergence_gradients(
        self, token_ids: Tensor, reference_states: Tensor, allocation: Allocation, divergences: list[float]
    ) -> Iterator[LayerGradients]:
        """Gradients of the summed KL(p ‖ p_choice) by the quantized weights, from the last layer to the first.

        The divergence itself, mean nats per token, is appended to `divergences`.
        """

        last_gradient = functools.partial(
            self._divergence_gradient, reference_states=reference_states, divergences=divergences
        )
        return self.weight_gradients(token_ids, allocation, last_gradient)

    def weight_gradients(
        self, token_ids: Tensor, allocation: Allocation, last_gradient: Callable[[Tensor], Tensor]
    ) -> Iterator[LayerGradients]:
        """Gradients by the quantized weights, from the last layer to the first.

        `last_gradient` makes the gradient at the states that leave the last block from these. A layer's grids are not
        looked at any more once its gradients are given. Raises NotFiniteError naming the layer.
        """
        entering = self._entering_states(token_ids, allocation, keep_all=True)
        inputs = self._model.block_inputs(entering[0].shape[1])
        gradient = last_gradient(entering.pop())
        for layer in reversed(range(self._model.structure.layers)):
            with self._block(layer, allocation) as (block, weights):
                gradient, of_weights = self._backward(block, weights, inputs[layer], entering.pop(), gradient)
                require_finite(gradient, f"the gradient at the states that enter layer {layer}")
                yield LayerGradients(layer, of_weights, weights)

    def _entering_states(self, token_ids: Tensor, allocation: Allocation | None, *, keep_all: bool) -> list[Tensor]:
        """States that enter every block, then those that leave the last; or these alone."""
        states = [self._model.embed(token_ids)]
        inputs = self._model.block_inputs(states[0].shape[1])
        for layer in range(self._model.structure.layers):
            leaving = states[-1].clone() if keep_all else states.pop()
            with self._block(layer, allocation) as (block, _), torch.no_grad(), self._autocast():
                states.append(self._run(block, inputs[layer], leaving, layer))
        return states

    @staticmethod
    def _run(block: nn.Module, inputs: BlockInputs, hidden: Tensor, layer: int) -> Tensor:
        """Put the states that leave a block in the place of those that enter it."""
        for sequence in range(len(hidden)):
            piece = slice(sequence, sequence + 1)
            hidden[piece] = inputs.run(block, hidden[piece])
        require_finite(hidden, f"the states that leave layer {layer}")
        return hidden

    @torch.no_grad()
    def _divergences(self, states: Sequence[Tensor], reference_states: Tensor) -> Tensor:
        """Mean KL per token of each sequence, float64 [states, sequences]; the last position predicts nothing."""
        loss = self._model.loss
        by_piece = zip(*(self._model.split(loss.predicting(part)) for part in (reference_states, *states)), strict=True)
        found = []
        for reference, *pieces in by_piece:
            expected = self._predictions(reference)
            found.append(torch.stack([loss.divergence(expected, self._predictions(piece)) for piece in pieces]))
        return torch.cat(found, dim=1).view(len(states), len(reference_states), -1).mean(dim=2).cpu()

    @contextmanager
    def _block(self, layer: int, allocation: Allocation | None) -> Iterator[tuple[nn.Module, dict[ModuleId, Tensor]]]:
        """A block with the weights of an allocation, and the weights it had."""
        with self._model.block(layer) as block:
            weights: dict[ModuleId, Tensor] = {}
            if allocation is not None:
                for module, by_spec in self._grids(layer).items():
                    linear = block.get_submodule(module.kind)
                    weights[module] = linear.get_parameter("weight").detach()
                    grid = by_spec[allocation[module]].to(self._model.device)
                    linear.weight = nn.Parameter(grid.round_trip(weights[module]))
            yield block, weights

    def _loss_gradient(self, hidden: Tensor, given: Tensor) -> Tensor:
        """Gradient of the summed loss at the states that leave the last block."""
        return self._model.loss_gradient(hidden, given).gradient

    def _divergence_gradient(self, hidden: Tensor, reference_states: Tensor, divergences: list[float]) -> Tensor:
        """Gradient of the summed KL(p ‖ p_hidden) at the states that leave the last block, float32, same shape.

        It is 0 at the last position of every text, which predicts nothing. The mean KL is appended to `divergences`.
        """
        loss = self._model.loss
        states, reference = (self._model.split(loss.predicting(part)) for part in (hidden, reference_states))
        pieces, found = [], []
        for piece, reference_piece in zip(states, reference, strict=True):
            leaving = piece.detach().to(self._model.device, self._model.dtype).requires_grad_(True)
            with torch.no_grad():
                expected = self._predictions(reference_piece)
            with torch.enable_grad():
                of_predictions = loss.divergence(expected, self._predictions(leaving))
                pieces.append(torch.autograd.grad(of_predictions.sum(), leaving)[0].float())
            found.append(of_predictions.detach())
        divergences.append(torch.cat(found).mean().item())
        return loss.at_states(torch.cat(pieces)[None], hidden)[0]

    def _backward(
        self,
        block: nn.Module,
        modules: Mapping[ModuleId, Tensor],
        inputs: BlockInputs,
        hidden: Tensor,
        gradient: Tensor,
    ) -> tuple[Tensor, dict[ModuleId, Tensor]]:
        """Gradients at the states that enter a block and of its modules' weights, summed over the sequences."""
        parameters = {module: block.get_submodule(module.kind).get_parameter("weight") for module in modules}
        entering_gradient = torch.empty_like(hidden, dtype=torch.float32)
        sums = {module: torch.zeros_like(parameter, dtype=torch.float32) for module, parameter in parameters.items()}
        for sequence in range(len(hidden)):
            piece = slice(sequence, sequence + 1)
            entering = hidden[piece].detach().requires_grad_(True)
            with torch.enable_grad(), self._autocast():
                leaving = inputs.run(block, entering)
            found = torch.autograd.grad(
                leaving, [entering, *parameters.values()], gradient[piece].to(leaving), allow_unused=True
            )
            entering_gradient[piece] = found[0]
            for total, weight_gradient in zip(sums.values(), found[1:], strict=True):
                if weight_gradient is not None:  # an expert that no token of the sequence was routed to has none
                    total += weight_gradient
        return entering_gradient, sums

    def _predictions(self, states: Tensor) -> Tensor:
        """What divergences compare, float32 [predictions, outputs], for the states they are made from."""
        with self._autocast():
            outputs = self._model.head_logits(states)
        return self._model.loss.predictions(outputs)

    def _autocast(self) -> torch.autocast:
        return fast_products(self._model.device, self._matmul_dtype)


def _slopes(
    gradient: Tensor,
    weight: Tensor,
    grids: Mapping[QuantSpec, RoundedWeight],
    chosen: QuantSpec,
    menu: Sequence[QuantSpec],
) -> list[float]:
    """⟨gradient, Ŵ_c − Ŵ_chosen⟩ for every configuration of the menu."""
    current = grids[chosen].to(weight.device).round_trip(weight)
    return [
        0.0
        if spec == chosen
        else float((gradient * (grids[spec].to(weight.device).round_trip(weight) - current)).sum(dtype=torch.float64))
        for spec in menu
    ]


def _way_back(
    gradient: Tensor, weight: Tensor, grids: Mapping[QuantSpec, RoundedWeight], chosen: QuantSpec
) -> list[float]:
    """⟨gradient, W − Ŵ_chosen⟩."""
    change = weight - grids[chosen].to(weight.device).round_trip(weight)
    return [float((gradient * change).sum(dtype=torch.float64))]
