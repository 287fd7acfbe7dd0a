"""Whether what comes later in a text changes what a model says of what comes before, as it does in encoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmq.errors import InputError

_TOLERANCE = 1e-3
"""Largest change of what comes before, relative to it, that rounding can make."""


@torch.no_grad()
def require_causal(run: Callable[[Tensor], Tensor], inputs: Tensor, changed: Tensor, name: str) -> None:
    """Raise InputError where what comes last changes what is before it: an encoder, which has seen all it predicts.

    `inputs` and `changed` [1, tokens, ...] differ at the last token alone; `name` is the model's.
    """
    first, second = (run(states)[:, :-1].float() for states in (inputs, changed))
    distance, size = (first - second).abs().max(), first.abs().max()
    if distance > _TOLERANCE * size:
        raise InputError(
            f"{name} reads its text both ways, as encoders do: later tokens change what it says of earlier ones, so "
            "that it has no perplexity; give a model that predicts the next token from those before"
        )
