"""Kurtosis of weight matrices: how heavy the tails of their distribution are."""

from __future__ import annotations

import torch

from lmq.errors import InputError
from lmq.finite import finite_sum

_CHUNK_ELEMENTS = 1 << 16
_CONSTANT_VARIANCE = 1e-26
"""Variance, relative to the squared mean, that the rounding of the mean alone can leave in a constant matrix."""


def kurtosis(weight: torch.Tensor, name: str = "the weight") -> float:
    """Pearson kurtosis m4 / m2² of all elements, population moments: 3 for a normal distribution.

    `weight` of any shape and float dtype; moments are accumulated in float64, chunk by chunk.
    Equals scipy.stats.kurtosis(fisher=False, bias=True). Zhang et al. 2025 (arXiv 2503.06518), equation 11.

    Raises:
        NotFiniteError: the weight holds NaN or infinity.
        InputError: all elements are equal, so that no kurtosis exists.
    """
    elements = max(weight.numel(), 1)
    mean = finite_sum(weight, name) / elements
    buffer = torch.empty(_CHUNK_ELEMENTS, dtype=torch.float64, device=weight.device)
    second_sum = fourth_sum = 0.0
    for chunk in weight.detach().reshape(-1).split(_CHUNK_ELEMENTS):
        squares = buffer[: chunk.numel()]
        squares.copy_(chunk).sub_(mean).square_()
        second_sum += float(squares.sum())
        fourth_sum += float(squares.dot(squares))
    variance = second_sum / elements
    if variance <= _CONSTANT_VARIANCE * mean * mean:
        raise InputError(
            f"{name} has no kurtosis: its {weight.numel():,} elements all equal {mean:g}; "
            "leave this matrix out of the kurtosis profile"
        )
    return fourth_sum / elements / variance**2
