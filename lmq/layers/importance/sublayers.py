"""The attention and the MLP of every decoder block, and blocks with the output of one of them removed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmq.errors import UnsupportedModel
from lmq.model.block_inputs import BlockInputs
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure

SUBLAYERS = ("attention", "mlp")
_WHOLE_LAYERS = "measure whole layers only: `lmq importance --without removal`, `lmq prune --metric block-influence`"
_TRIED_TOKENS = 4
_WAYS = {"attention": ("attn_in", "attn_out"), "mlp": ("mlp_gate", "mlp_down")}


@dataclass(frozen=True)
class SubLayer:
    """Attention or MLP of one layer; `paths` are the modules inside the block whose outputs reach the residual."""

    layer: int
    name: str
    paths: tuple[str, ...]


def find_sublayers(structure: ModelStructure) -> tuple[SubLayer, ...]:
    """Attention and MLP of every layer, in that order: player 2·layer is the attention, 2·layer + 1 the MLP.

    Raises UnsupportedModel naming a block that lacks one of them.
    """
    return tuple(
        SubLayer(layer, name, _output_paths(structure, layer, name))
        for layer in range(structure.layers)
        for name in SUBLAYERS
    )


def layer_groups(layers: int) -> list[tuple[int, int]]:
    """The two players of every layer."""
    return [(2 * layer, 2 * layer + 1) for layer in range(layers)]


@contextmanager
def without_sublayers(block: nn.Module, sublayers: Collection[SubLayer]) -> Iterator[None]:
    """Inside the context the outputs of the given sub-layers of a block are 0."""
    with ExitStack() as hooks:
        for path in (path for sublayer in sublayers for path in sublayer.paths):
            hooks.callback(block.get_submodule(path).register_forward_hook(_zero_output).remove)
        yield


@torch.no_grad()
def check_residual(block: nn.Module, inputs: BlockInputs, hidden: Tensor, sublayers: Sequence[SubLayer]) -> None:
    """Check that a block is its input plus what its two sub-layers add: without both it returns its input.

    `hidden` [sequences, sequence_length, hidden] enters the block. It is this that makes zeroing an output a removal,
    also behind a norm (Gemma), which leaves 0 as it is. Raises UnsupportedModel naming the block.
    """
    with without_sublayers(block, sublayers):
        leaving = inputs.run(block, hidden)
    if not torch.equal(leaving, hidden.to(leaving)):
        paths = " and ".join(path for sublayer in sublayers for path in sublayer.paths)
        raise UnsupportedModel(
            f"block {sublayers[0].layer} ({type(block).__name__}) does not return its input when the outputs of "
            f"{paths} are 0: its sub-layers do not simply add to a "
            f"residual stream, so that none can be removed; {_WHOLE_LAYERS}"
        )


def check_removable(model: StreamedModel) -> None:
    """Raise UnsupportedModel where the sub-layers of the first block cannot be removed, before anything is measured."""
    sublayers = find_sublayers(model.structure)[: len(SUBLAYERS)]
    hidden = torch.randn(1, _TRIED_TOKENS, model.structure.hidden_size, generator=torch.Generator().manual_seed(0))
    with model.block(0) as block:
        check_residual(block, model.block_inputs(_TRIED_TOKENS)[0], hidden, sublayers)


def _output_paths(structure: ModelStructure, layer: int, name: str) -> tuple[str, ...]:
    """The children of the block that hold all modules of the sub-layer and no other, else the module that leads out.

    Shared experts beside the routed ones may be a child of their own.
    """
    way_in, way_out = _WAYS[name]
    modules = structure.in_layer(layer)
    own = [info.id.kind for info in modules if info.part in (way_in, way_out)]
    if not own:
        raise UnsupportedModel(
            f"block {layer} of {structure.architecture} has no {name} that lmq recognises (its modules: "
            f"{', '.join(info.id.kind for info in modules)}); {_WHOLE_LAYERS}"
        )
    children = {kind.partition(".")[0] for kind in own}
    others = {info.id.kind.partition(".")[0] for info in modules if info.id.kind not in own}
    if not children & others and children.isdisjoint(own):
        return tuple(sorted(children))
    return (next(info.id.kind for info in modules if info.part == way_out),)


def _zero_output(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
