"""A symmetric matrix by what is on and above its diagonal: half of the memory, and of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_COLUMNS = 256


class UpperTriangle:
    """A symmetric matrix [size, size] by what is on and above its diagonal, in blocks of 256 columns, float32.

    Block k holds the rows of all columns up to its last: [min(size, 256 (k + 1)), columns].
    """

    def __init__(self, blocks: Sequence[Tensor]):
        self.blocks = tuple(blocks)

    @classmethod
    def zeros(cls, size: int, device: torch.device | str = "cpu") -> UpperTriangle:
        """A matrix of zeros to add to."""
        return cls(
            [torch.zeros(columns.stop, columns.stop - columns.start, device=device) for columns in _column_blocks(size)]
        )

    @classmethod
    def of(cls, matrix: Tensor) -> UpperTriangle:
        """That of a symmetric matrix."""
        return cls([matrix[: columns.stop, columns].contiguous() for columns in _column_blocks(len(matrix))])

    @property
    def size(self) -> int:
        """Rows, and columns, of the matrix."""
        return len(self.blocks[-1])

    def add_products(self, inputs: Tensor, weights: Tensor) -> None:
        """Add Σ_t w_t x_t x_tᵀ of `inputs` [tokens, size] and `weights` [tokens]."""
        rows = inputs.float()
        weighted = rows * weights.to(rows)[:, None]
        for block, columns in zip(self.blocks, _column_blocks(self.size), strict=True):
            block.addmm_(weighted[:, : columns.stop].t(), rows[:, columns])

    def divide(self, divisor: float) -> None:
        """Divide every entry."""
        for block in self.blocks:
            block.div_(divisor)

    def matrix(self) -> Tensor:
        """The whole matrix, float32 [size, size]."""
        full = torch.empty(self.size, self.size, device=self.blocks[0].device)
        for block, columns in zip(self.blocks, _column_blocks(self.size), strict=True):
            full[: columns.stop, columns] = block
            full[columns, : columns.start] = block[: columns.start].t()
            square = full[columns, columns]
            square.copy_(square.triu() + square.triu(1).t())
        return full


def triangle_bytes(size: int) -> int:
    """Bytes of the blocks of a matrix [size, size]."""
    return 4 * sum(columns.stop * (columns.stop - columns.start) for columns in _column_blocks(size))


def _column_blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _COLUMNS, size)) for start in range(0, size, _COLUMNS))
