"""What goes through the experts of a block, expert by expert, so that one of them is in memory at a time.

One replay keeps what enters the routed experts as a whole and the gradient at their sum. From that follows what goes
through any expert, with its own two matrices alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmq.measurement.traces import ModuleTrace
from lmq.model.block_inputs import BlockInputs
from lmq.model.experts import RoutedExperts
from lmq.numerics import OneDnnProducts


@dataclass(frozen=True, eq=False)
class _Sequence:
    """What one sequence brings: `states` [tokens, hidden], `index` and `weights` [tokens, k] of the router, and
    `gradients` at the sum of the experts' outputs, [tokens, hidden] for every draw."""

    states: Tensor
    index: Tensor
    weights: Tensor
    gradients: list[Tensor]


class ExpertTraces:
    """What went through the routed experts at `path` of a block, from one replay.

    `hidden` [sequences, sequence_length, hidden] enters the block, `gradient` [draws · sequences, sequence_length,
    hidden] is ∂L/∂output of the block. Held are float32 tables of that size.
    """

    def __init__(self, block: nn.Module, block_inputs: BlockInputs, hidden: Tensor, gradient: Tensor, path: str):
        experts = block.get_submodule(path)
        assert isinstance(experts, RoutedExperts), path
        self.path = path
        self._experts = experts
        self._sequences: list[_Sequence] = []
        self._draws = len(gradient) // len(hidden)
        handle = experts.register_forward_hook(self._keep)
        try:
            for number in range(len(hidden)):
                entering = hidden[number : number + 1].detach().requires_grad_(True)
                with torch.enable_grad():
                    leaving = block_inputs.run(block, entering)
                for draw in range(self._draws):
                    piece = gradient[draw * len(hidden) + number][None].to(leaving)
                    torch.autograd.grad(leaving, entering, piece, retain_graph=draw + 1 < self._draws)
        finally:
            handle.remove()

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        states, index, weights = (tensor.detach().clone() for tensor in args)
        gradients: list[Tensor] = []
        output.register_hook(lambda gradient: gradients.append(gradient.detach().clone()))
        self._sequences.append(_Sequence(states, index, weights, gradients))

    def of(self, number: int) -> dict[str, ModuleTrace]:
        """Traces of one expert's matrices by kind, float32; those that `lmq.measurement.traces.trace_block` gives."""
        experts = self._experts
        kinds = {f"{self.path}.{number}.{name}": name for name in experts.matrices}
        inputs: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        gradients: dict[str, list[list[Tensor]]] = {kind: [[] for _ in range(self._draws)] for kind in kinds}
        found: dict[str, Tensor] = {}
        lengths: list[int] = []

        def keep(kind: str, args: Any, output: Tensor) -> None:
            inputs[kind].append(args[0].detach())
            output.register_hook(lambda gradient: found.__setitem__(kind, gradient.detach()))

        with experts.in_memory(number):
            handles = [
                block.register_forward_hook(lambda _, args, output, kind=kind: keep(kind, args, output))
                for kind, name in kinds.items()
                for block in [experts.get_submodule(f"{number}.{name}")]
            ]
            try:
                for each in self._sequences:
                    rows = (each.index.flatten() == number).nonzero().flatten()
                    tokens = rows // each.index.shape[1]
                    lengths.append(len(tokens))
                    entering = each.states[tokens].requires_grad_(True)
                    with torch.enable_grad(), OneDnnProducts():
                        outputs = experts.run(number, entering)
                    for draw, gradient in enumerate(each.gradients):
                        leaving = gradient[tokens] * each.weights.flatten()[rows, None]
                        torch.autograd.grad(outputs, entering, leaving, retain_graph=draw + 1 < self._draws)
                        for kind in kinds:
                            gradients[kind][draw].append(found.pop(kind))
            finally:
                for handle in handles:
                    handle.remove()
        return {
            kind: ModuleTrace(
                torch.cat(inputs[kind]),
                torch.cat([piece for draw in gradients[kind] for piece in draw]),
                tuple(lengths),
                self._draws,
            )
            for kind in kinds
        }
