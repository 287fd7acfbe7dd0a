"""What goes through the modules of one decoder block: inputs and output gradients, from a replay forward and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmq.measurement.copies import Copies
from lmq.model.block_inputs import BlockInputs


@dataclass(frozen=True, eq=False)
class ModuleTrace:
    """What went through one module: `inputs` [tokens, in_features], `gradients` [draws · tokens, out_features].

    Of the loss of a text there is one draw; tokens are fastest. An expert has the tokens alone that were routed to it:
    `lengths` are how many of every sequence, None for sequences of one length.
    """

    inputs: Tensor
    gradients: Tensor
    lengths: tuple[int, ...] | None = None
    draws: int = 1


def trace_modules(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    gradient: Tensor,
    kinds: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, ModuleTrace]:
    """The modules' part of `trace_block`."""
    return trace_block(block, block_inputs, hidden, gradient, kinds, dtype)[0]


def trace_block(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    gradient: Tensor,
    kinds: Sequence[str],
    dtype: torch.dtype,
) -> tuple[dict[str, ModuleTrace], Tensor]:
    """Replay one block forward and backward and keep every module's inputs and output gradients.

    `hidden` [sequences, sequence_length, hidden] enters the block, `gradient` [draws · sequences, sequence_length,
    hidden] is ∂L/∂output of the block; what leaves a projector differs from that in length and width. Each sequence
    runs forward once for all draws. Traces are kept in `dtype` on the block's device; modules that share an input share
    its tensor. A module that is not called for a sequence, as an expert that no token is routed to, has no tokens of
    it. The block is left as it was.

    Beside the traces by kind: the gradient at the states that enter, float32 [draws · sequences, sequence_length,
    hidden].
    """
    entering_gradient = gradient.new_empty(len(gradient), *hidden.shape[1:], dtype=torch.float32)
    draws = range(0, len(gradient), len(hidden))
    inputs: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    gradients: dict[str, list[list[Tensor]]] = {kind: [[] for _ in draws] for kind in kinds}

    def by_token(states: Tensor) -> Tensor:
        """A copy also where nothing is converted: the block may go on to change `states` in place."""
        return states.detach().flatten(0, -2).to(dtype, copy=True)

    lengths: dict[str, list[int]] = {kind: [] for kind in kinds}
    copies = Copies(by_token)

    def watch(kind: str) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not lengths[kind][-1]:  # else computed again on the way back, for another draw
                inputs[kind].append(copies(args[0]))
                lengths[kind][-1] = len(inputs[kind][-1])
            output.register_hook(lambda output_gradient: found.__setitem__(kind, by_token(output_gradient)))

        return block.get_submodule(kind).register_forward_hook(keep)

    found: dict[str, Tensor] = {}
    handles = [watch(kind) for kind in kinds]
    try:
        for sequence in range(len(hidden)):
            entering = hidden[sequence : sequence + 1].detach().requires_grad_(True)
            for of_kind in lengths.values():
                of_kind.append(0)
            with torch.enable_grad():
                leaving = block_inputs.run(block, entering)
            for number, draw in enumerate(draws):
                piece = gradient[draw + sequence][None].to(leaving)
                (at_entering,) = torch.autograd.grad(leaving, entering, piece, retain_graph=draw != draws[-1])
                entering_gradient[draw + sequence] = at_entering[0]
                for kind in list(found):
                    gradients[kind][number].append(found.pop(kind))
            copies.clear()
    finally:
        for handle in handles:
            handle.remove()
    joined: dict[Tensor, Tensor] = {}
    traces = {}
    for kind in kinds:  # pieces are let go of kind by kind, so that a block's traces are never held twice
        pieces, by_draw = inputs.pop(kind), gradients.pop(kind)
        if not pieces:
            weight = block.get_submodule(kind).get_parameter("weight")
            none = hidden.new_empty(0, dtype=dtype, device=block_inputs.device)
            of_inputs, of_outputs = (none.view(0, size) for size in reversed(weight.shape))
        else:
            first = pieces[0]
            if first not in joined:
                joined[first] = torch.cat(pieces)
            of_inputs, of_outputs = joined[first], torch.cat([piece for draw in by_draw for piece in draw])
        traces[kind] = ModuleTrace(of_inputs, of_outputs, tuple(lengths[kind]), len(draws))
    return traces, entering_gradient
