"""What a decoder block is called with beside its states, kept and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lmq.numerics import OneDnnProducts


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What one decoder block is called with beside the hidden states: mask, positions and the like.

    Valid for one sequence length; recorded with one sequence, which blocks of all but a few older architectures
    (BLOOM, XGLM) extend to several. Holds no cache of keys and values.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """States that leave the block [sequences, sequence_length, hidden] for those that enter it.

        The block works on copies, which it may change in place.
        """
        args, kwargs = copied((self.args, self.kwargs))
        with OneDnnProducts():
            output = block(hidden.to(self.device, self.dtype, copy=True), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def copied(arguments: Any, copy: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """Arguments of a call (nested tuples, lists and dicts) with their tensors copied: a block may change its own."""
    return tree_map(lambda leaf: copy(leaf) if isinstance(leaf, Tensor) else leaf, arguments)


def by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call, those without a name by their number."""
    return {**{str(number): value for number, value in enumerate(args)}, **kwargs}


def equal_inputs(first: Any, second: Any) -> bool:
    """Whether what two calls of a block are given is the same."""
    ours, theirs = tree_leaves(first), tree_leaves(second)
    return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))


def _is_equal(first: Any, second: Any) -> bool:
    """Tensors and plain values are compared; of other objects, such as a cache, only the type."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    is_plain = isinstance(first, bool | int | float | str)
    return type(first) is type(second) and (not is_plain or bool(first == second))


def same_tensors(first: Any, second: Any) -> bool:
    """Whether the tensors of two nested values of one structure are equal."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and a is not b)
