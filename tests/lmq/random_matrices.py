"""Random weights and second moments that look like those of a trained model."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_different_spread(rows: int, columns: int) -> Tensor:
    """Normal weights [rows, columns] of the size that a trained model has."""
    generator = torch.Generator().manual_seed(0)
    return 0.05 * torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) + 0.2)


def correlated_moments(columns: int) -> Tensor:
    """Second moments [columns, columns] of correlated inputs of different size."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(900, 64, generator=generator) @ torch.randn(64, columns, generator=generator)
    inputs = (mixed / 8 + torch.randn(900, columns, generator=generator)) * torch.rand(columns, generator=generator)
    return inputs.t() @ inputs / 900
