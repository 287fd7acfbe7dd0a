"""A grid together with the codes of its matrix, for quantizers that do not round every weight to its nearest code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmq.errors import InputError
from lmq.formats.gguf_types import GgufMatrix
from lmq.formats.groups import Grid, encode, from_groups, to_groups
from lmq.formats.packing import pack, unpack
from lmq.formats.spec import QuantSpec

CODES_TENSOR = "codes"

EncodedMatrix = Grid | GgufMatrix
"""A matrix in one configuration as a checkpoint stores it; of a plain `Grid` the codes are the nearest ones."""


@dataclass(frozen=True, eq=False)
class CodedGrid(Grid):
    """A quantized matrix as its checkpoint stores it: a grid, and `packed_codes` uint8 [elements · bits / 8].

    It stands wherever a `Grid` does. The weight that `codes` and `round_trip` are given is not looked at: the codes
    were found for it already.
    """

    packed_codes: torch.Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        size_bytes = self.shape[0] * self.shape[1] * self.spec.bits // 8
        if tuple(self.packed_codes.shape) != (size_bytes,) or self.packed_codes.dtype != torch.uint8:
            raise InputError(
                f"packed codes of a {self.spec} matrix {list(self.shape)} must be torch.uint8 [{size_bytes}], "
                f"not {self.packed_codes.dtype} {list(self.packed_codes.shape)}"
            )

    @classmethod
    def of(cls, grid: Grid, codes: torch.Tensor) -> CodedGrid:
        """A grid with codes uint8 [out_features, in_features]."""
        grouped = to_groups(codes.reshape(grid.shape), grid.spec.group_size, grid.axis)
        return cls.from_grid(grid, pack(grouped, grid.spec.bits))

    @classmethod
    def from_grid(cls, grid: Grid, packed_codes: torch.Tensor) -> CodedGrid:
        """A grid with packed codes uint8 [elements · bits / 8]."""
        return cls(grid.spec, grid.shape, grid.axis, **grid.to_tensors(), packed_codes=packed_codes)

    def coded_tensors(self) -> dict[str, torch.Tensor]:
        """All stored tensors by name, the packed codes among them."""
        return {CODES_TENSOR: self.packed_codes, **self.to_tensors()}

    def to(self, device: torch.device | str) -> CodedGrid:
        """The same matrix on another device."""
        return CodedGrid.from_grid(super().to(device), self.packed_codes.to(device))

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The code of every weight, uint8 [groups, group_size]."""
        return unpack(self.packed_codes, self.spec.bits).view(-1, self.spec.group_size)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the checkpoint will have it, float32 [out_features, in_features]."""
        return self.dequantize(self.codes(weight))


def grid_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    axis: int,
    *,
    integer_zeros: bool = False,
) -> CodedGrid:
    """Codes uint8 [groups, group_size] with scales and zeros float32 [groups] as a checkpoint stores them."""
    whole = codes.clone()
    whole[:, 0], whole[:, 1] = 0, 2**spec.bits - 1  # `encode` widens grids that their weights do not fill
    covered = whole.float().sub_(zero[:, None]).mul_(scale[:, None])
    grid = encode(from_groups(covered, shape, axis), scale, zero, spec, axis, integer_zeros=integer_zeros)
    return CodedGrid.from_grid(grid, pack(codes, spec.bits))
