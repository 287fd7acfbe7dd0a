"""Copies of what a model goes on using: its own in-place operations must not change what was kept of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Copies:
    """Copies tensors by `copy`, once each: modules that take the same input share its copy.

    A tensor that was changed in place in between is another input, and so is copied anew. What was copied is held
    until `clear`, so that no later tensor can take its place in memory unnoticed.
    """

    def __init__(self, copy: Callable[[Tensor], Tensor] = torch.clone):
        self._copy = copy
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor as it is now."""
        key = (id(tensor), tensor._version)
        if key not in self._made:
            self._made[key] = (tensor, self._copy(tensor))
        return self._made[key][1]

    def clear(self) -> None:
        """Forget all copies."""
        self._made.clear()
