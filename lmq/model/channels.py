"""Channels that can be rescaled inside a block without changing what it computes.

What a norm or a matrix gives may be divided channel by channel, if the matrices that take it are multiplied by the
same: a norm before queries, keys and values; values before the output projection; the up projection before the down
projection (cross-layer equalization, Nagel et al. 2019, arXiv 1906.04721). Which of them a block lets be rescaled is
tried on it, not read off names: a random rescaling must leave its output as it is.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import expert_number

_TOLERANCE = 1e-5
"""Of what the block adds to its states, relative: what is left of a rescaling that cancels is rounding, 1e-6."""
TRIED_TOKENS = 8
"""A rescaling is tried on normal states of so many tokens: in states of text a few tokens may hide the others."""
_SPREAD = 0.5
"""Of the logarithms of the random factors that are tried."""


@dataclass(frozen=True, kw_only=True)
class SharedChannels:
    """A source of channels in a block and the matrices that alone take them, by their paths in the block.

    The source is a norm, which multiplies by its weight + `offset`, or a matrix (`offset` None), whose outputs may be
    repeated: as [heads, `head_size`] each `repeats` times, as the values of grouped attention are.
    """

    source: str
    takers: tuple[str, ...]
    offset: int | None = None
    repeats: int = 1
    head_size: int = 1

    def repeated(self, values: Tensor) -> Tensor:
        """Values of the source's channels [channels], as the takers' inputs have them."""
        return values.view(-1, 1, self.head_size).expand(-1, self.repeats, -1).reshape(-1)

    def pooled(self, values: Tensor) -> Tensor:
        """Values of the takers' inputs, averaged over those that are one channel of the source."""
        return values.view(-1, self.repeats, self.head_size).mean(1).reshape(-1)

    def tensors(self, block: nn.Module) -> list[str]:
        """Names in the block of the tensors that a rescaling changes."""
        names = [name for name, _ in block.get_submodule(self.source).named_parameters(self.source, recurse=False)]
        return [*names, *(f"{taker}.weight" for taker in self.takers)]

    @torch.no_grad()
    def rescale(self, block: nn.Module, factors: Tensor) -> None:
        """Divide the source's channels by `factors` [channels] and multiply what takes them, in place."""
        for name, value in block.get_submodule(self.source).named_parameters(recurse=False):
            if self.offset and name == "weight":
                value.add_(self.offset).div_(factors).sub_(self.offset)
            else:
                value.div_(factors if value.ndim == 1 else factors[:, None])
        inputs = self.repeated(factors)
        for taker in self.takers:
            block.get_submodule(taker).get_parameter("weight").mul_(inputs)


@torch.no_grad()
def shared_channels(
    block: nn.Module, inputs: BlockInputs, hidden_size: int, kinds: Sequence[str], direct: Container[str]
) -> list[SharedChannels]:
    """Which channels of a block can be rescaled: sources that are matrices first.

    `inputs` are those for sequences of 8 tokens (`TRIED_TOKENS`), `kinds` the block's matrices. Only tensors in
    `direct`, by their names in the block, are changed. Matrices of experts are left alone.
    """
    hidden = torch.randn(1, TRIED_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(inputs.device, inputs.dtype)
    matrices = [kind for kind in kinds if expert_number(kind) is None and f"{kind}.weight" in direct]
    entering, leaving, expected = _observed(block, inputs, hidden)
    norms: list[SharedChannels] = []
    between: list[SharedChannels] = []
    for takers in _of_same_input(matrices, entering):
        width = entering[takers[0]].shape[-1]
        for candidate in _candidates(block, takers, width, entering, leaving, matrices):
            if all(name in direct for name in candidate.tensors(block)) and _keeps_output(
                block, inputs, hidden, expected, candidate
            ):
                (between if candidate.offset is None else norms).append(candidate)
                break
    return between + norms


def _observed(
    block: nn.Module, inputs: BlockInputs, hidden: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What enters and what leaves every module with weights of its own, by path, and what leaves the block."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}
    handles = []
    for path, module in block.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:

            def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
                if args and isinstance(output, Tensor):
                    entering[path], leaving[path] = args[0], output

            handles.append(module.register_forward_hook(keep))
    try:
        return entering, leaving, inputs.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _of_same_input(matrices: Sequence[str], entering: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Matrices that are given the very same tensor."""
    together: dict[int, list[str]] = {}
    for path in matrices:
        if path in entering:
            together.setdefault(id(entering[path]), []).append(path)
    return [tuple(paths) for paths in together.values()]


def _candidates(
    block: nn.Module,
    takers: tuple[str, ...],
    width: int,
    entering: Mapping[str, Tensor],
    leaving: Mapping[str, Tensor],
    matrices: Sequence[str],
) -> Iterator[SharedChannels]:
    """What the channels of the takers' input may come from."""
    of_norm = [path for path, output in leaving.items() if output is entering[takers[0]] and path not in matrices]
    for path in of_norm:
        if all(value.shape == (width,) for value in block.get_submodule(path).parameters(recurse=False)):
            yield from (SharedChannels(source=path, takers=takers, offset=offset) for offset in (0, 1))
    if of_norm:
        return
    heads = [size for module in block.modules() if isinstance(size := getattr(module, "head_dim", None), int)]
    for path in matrices:
        channels = leaving[path].shape[-1] if path in leaving else 0
        if path in takers or not channels or width % channels:
            continue
        repeats = width // channels
        size = channels if repeats == 1 else next(iter(heads), channels)
        if channels % size == 0:
            yield SharedChannels(source=path, takers=takers, repeats=repeats, head_size=size)


def _keeps_output(
    block: nn.Module, inputs: BlockInputs, hidden: Tensor, expected: Tensor, candidate: SharedChannels
) -> bool:
    """Whether a random rescaling leaves the block's output as it is."""
    names = candidate.tensors(block)
    with restored(block, names):
        weight = block.get_submodule(candidate.source).get_parameter("weight")
        generator = torch.Generator().manual_seed(0)
        factors = (_SPREAD * torch.randn(len(weight), generator=generator)).exp().to(weight)
        candidate.rescale(block, factors)
        added = expected - hidden
        return relative_difference(inputs.run(block, hidden) - hidden, added) <= _TOLERANCE


@contextmanager
def restored(block: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give tensors of a block their values back when the work inside is done."""
    kept = {name: block.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                block.get_parameter(name).copy_(value)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|; infinite where something is not finite."""
    difference = float((found.double() - expected.double()).norm() / expected.double().norm())
    return difference if difference == difference else float("inf")
