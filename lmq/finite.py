"""Refusal of tensors that hold NaN or infinity, which no statistic and no grid survives."""

from __future__ import annotations

import math

import torch

from lmq.errors import NotFiniteError

_CHUNK_ELEMENTS = 1 << 16


def finite_sum(tensor: torch.Tensor, name: str) -> float:
    """Sum of all elements in float64. Raises NotFiniteError naming the tensor and its count of NaN and infinities."""
    chunks = tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS)
    total = math.fsum(float(chunk.sum(dtype=torch.float64)) for chunk in chunks) if tensor.numel() else 0.0
    if not math.isfinite(total):
        count = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteError(
            f"{name} holds {count:,} elements of {tensor.numel():,} that are NaN or infinite; "
            "repair or download the model again before quantizing it"
        )
    return total


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise NotFiniteError naming the tensor and its count of NaN and infinite elements, if there are any."""
    finite_sum(tensor, name)
