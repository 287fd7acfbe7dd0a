"""What goes through the blocks beside a language model, a tower for images and a projector, for images with text.

Images go through the model's own forward; hooks keep what enters a block and what a loss's gradient is where it leaves.
Everything measured of a block replays it from these, so that it has to do by itself, on states alone, what it does
within the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmq.errors import UnsupportedModel
from lmq.model.streaming import StreamedModel

_KEEP = "leave it out of modules"

_TOLERANCE = 1e-3
"""Relative difference of what a block makes by itself; kernels for several images round otherwise, by 1e-6."""


class BlockTrace(NamedTuple):
    """States that enter a block [images, patches, width] and those that leave it."""

    entering: Tensor
    leaving: Tensor


def states_beside(model: StreamedModel, pair: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """States that enter every block beside the language model [images, patches, width] for an image with text.

    To be called inside `model.with_beside()`. Raises UnsupportedModel naming a block that is not called once, or gives
    something else by itself than within the model, and a matrix that its block does not call once.
    """
    with torch.no_grad():
        _, traces = _traced(model, pair)
        for layer, trace in traces.items():
            _check_alone(model, layer, trace)
    return {layer: trace.entering for layer, trace in traces.items()}


def _check_alone(model: StreamedModel, layer: int, trace: BlockTrace) -> None:
    """Replay a block by itself, as everything measured of it does."""
    block, name = model.block_in_place(layer), _name(model, layer)
    calls = Counter({info.id.kind: 0 for info in model.structure.in_layer(layer)})

    def count(kind: str) -> RemovableHandle:
        return block.get_submodule(kind).register_forward_hook(lambda *_: calls.update([kind]))

    handles = [count(kind) for kind in calls]
    try:
        alone = model.states_alone(layer).run(block, trace.entering)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{name} cannot be run by itself on states alone ({why}); {_KEEP}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not (alone - trace.leaving).norm() <= _TOLERANCE * trace.leaving.norm():
        raise UnsupportedModel(
            f"{name} takes more than states, such as a mask of padded images: by itself it gives something else than "
            f"within the model; {_KEEP}"
        )
    for kind, times in calls.items():
        if times != 1:
            raise UnsupportedModel(
                f"{name} calls {kind} {times} times for the same states, and lmq measures matrices that are "
                f"called once; {_KEEP}"
            )


def gradients_beside(model: StreamedModel, pair: Mapping[str, Tensor], gradient: Tensor) -> dict[int, Tensor]:
    """Gradients at the states that leave every block beside the language model [draws, images, patches, width].

    `gradient` [draws, tokens, hidden] is that at the states which enter the language model. A block whose states go
    nowhere, as the last of a tower of which the one before is looked at, has 0. To be called inside
    `model.with_beside()`. Raises UnsupportedModel where no gradient comes through.
    """
    with torch.enable_grad():
        merged, traces = _traced(model, pair, with_gradient=True)
        leaving = [trace.leaving for trace in traces.values()]
        if not merged.requires_grad:
            first = _name(model, next(iter(traces)))
            raise UnsupportedModel(f"no gradient of the text comes through to {first}; {_KEEP}")
        by_draw = [
            torch.autograd.grad(merged, leaving, of_draw[None].to(merged), retain_graph=True, allow_unused=True)
            for of_draw in gradient
        ]
    return {
        layer: torch.stack([torch.zeros_like(at) if (found := draw[place]) is None else found for draw in by_draw])
        for place, (layer, (_, at)) in enumerate(traces.items())
    }


def _traced(
    model: StreamedModel, pair: Mapping[str, Tensor], *, with_gradient: bool = False
) -> tuple[Tensor, dict[int, BlockTrace]]:
    """The states that enter the language model, and what enters and leaves the blocks beside it."""
    traces: dict[int, list[BlockTrace]] = {layer: [] for layer in model.structure.layers_beside}
    with _watched(model, traces, with_gradient):
        merged = model.merged(pair)
    for layer, found in traces.items():
        if len(found) != 1 or found[0].entering.ndim != 3:
            shapes = ", ".join(str(list(trace.entering.shape)) for trace in found) or "none"
            raise UnsupportedModel(
                f"{_name(model, layer)} is called {len(found)} times for an image, with states of shape {shapes}; lmq "
                f"replays one call with [images, patches, width]; {_KEEP}"
            )
    return merged, {layer: found[0] for layer, found in traces.items()}


@contextmanager
def _watched(model: StreamedModel, traces: Mapping[int, list[BlockTrace]], with_gradient: bool) -> Iterator[None]:
    """Keep what goes through the blocks; with a gradient, from the first states on."""

    def states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else next(iter(kwargs.values()))

    def watch(layer: int) -> list[RemovableHandle]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not with_gradient or states(args, kwargs).requires_grad:
                return None
            own = states(args, kwargs).detach().requires_grad_(True)
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): own})

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            traces[layer].append(BlockTrace(states(args, kwargs), output[0] if isinstance(output, tuple) else output))

        block = model.block_in_place(layer)
        return [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave, with_kwargs=True),
        ]

    handles = [handle for layer in traces for handle in watch(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name(model: StreamedModel, layer: int) -> str:
    return f"{model.structure.block_path(layer)} of {model.structure.architecture}"
