"""How a quantized model's divergence changes with each configuration: gradients taken at the quantized point.

The model is streamed block by block, forward with the weights of a choice, then back with the gradient of the
divergence from the full-precision model, whose predictions are kept as the states that leave its last block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmq.capture import forward_block
from lmq.finite import require_finite
from lmq.streaming import BlockInputs, StreamedModel

LayerWeights = Callable[[int], Mapping[str, Tensor]]
"""Weights [out_features, in_features] of a layer by module kind, as a choice has them."""

LayerErrors = Callable[[int], Mapping[str, Tensor]]
"""Weight errors [configurations, out_features, in_features] of a layer by module kind."""


def divergence_slopes(
    model: StreamedModel, token_ids: Tensor, reference_states: Tensor, weights: LayerWeights, errors: LayerErrors
) -> list[dict[str, Tensor]]:
    """⟨∇_W KL(p ‖ p_choice), E⟩ of every layer's modules under every configuration, nats per token.

    `token_ids` [sequences, sequence_length]; `reference_states` [sequences, sequence_length, hidden] leave the last
    block of the full-precision model. Each value is float64 [configurations]. The slope of replacing a module's
    configuration is the difference of two of its entries. Raises NotFiniteError naming the layer.
    """
    inputs = model.block_inputs(token_ids.shape[1])
    entering = [model.embed(token_ids)]
    for layer in range(model.structure.layers):
        with _block_of_choice(model, layer, weights) as (block, _):
            entering.append(forward_block(block, inputs[layer], entering[-1], layer=layer))
    gradient = divergence_gradient(model, entering.pop(), reference_states)
    tokens = token_ids.shape[0] * (token_ids.shape[1] - 1)
    slopes: list[dict[str, Tensor]] = []
    for layer in reversed(range(model.structure.layers)):
        with _block_of_choice(model, layer, weights) as (block, parameters):
            gradient, weight_gradients = _backward(block, parameters, inputs[layer], entering.pop(), gradient)
        require_finite(gradient, f"the divergence gradient at the states that enter layer {layer}")
        layer_errors = errors(layer)
        slopes.append(
            {
                kind: (layer_errors[kind].flatten(1).to(weight_gradient) @ weight_gradient.flatten()).double().cpu()
                / tokens
                for kind, weight_gradient in weight_gradients.items()
            }
        )
    return slopes[::-1]


def divergence_gradient(model: StreamedModel, hidden: Tensor, reference_states: Tensor) -> Tensor:
    """Gradient of the summed KL(p ‖ p_hidden) at the states that leave the last block, float32, same shape.

    The last position of every sequence counts for nothing, as in the loss.
    """
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    step = model.tokens_at_once
    states, reference = (part[:, :-1].flatten(0, 1).split(step) for part in (hidden, reference_states))
    pieces = []
    for piece, reference_piece in zip(states, reference, strict=True):
        leaving = piece.detach().to(model.device, model.dtype).requires_grad_(True)
        with torch.no_grad():
            expected = model.head_logits(reference_piece).float().log_softmax(-1)
        with torch.enable_grad():
            found = model.head_logits(leaving).float().log_softmax(-1)
            divergence = (expected.exp() * (expected - found)).sum()
            pieces.append(torch.autograd.grad(divergence, leaving)[0].float())
    gradient[:, :-1] = torch.cat(pieces).to(gradient.device).view_as(gradient[:, :-1])
    return gradient


@contextmanager
def _block_of_choice(
    model: StreamedModel, layer: int, weights: LayerWeights
) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    with model.block(layer) as block:
        parameters = {}
        for kind, weight in weights(layer).items():
            linear = block.get_submodule(kind)
            parameters[kind] = nn.Parameter(weight.to(linear.get_parameter("weight")))
            linear.weight = parameters[kind]
        yield block, parameters


def _backward(
    block: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: BlockInputs, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients at the states that enter a block and of its weights, summed over the sequences."""
    entering_gradient = torch.empty_like(hidden, dtype=torch.float32)
    sums = {kind: torch.zeros_like(parameter, dtype=torch.float32) for kind, parameter in parameters.items()}
    for sequence in range(len(hidden)):
        piece = slice(sequence, sequence + 1)
        entering = hidden[piece].detach().requires_grad_(True)
        with torch.enable_grad():
            leaving = inputs.run(block, entering)
        found = torch.autograd.grad(leaving, [entering, *parameters.values()], gradient[piece].to(leaving))
        entering_gradient[piece] = found[0]
        for total, weight_gradient in zip(sums.values(), found[1:], strict=True):
            total += weight_gradient
    return entering_gradient, sums
