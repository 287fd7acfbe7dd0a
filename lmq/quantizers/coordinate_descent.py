"""Coordinate descent on what a quantized matrix stores: its codes, scales and zeros, for the least tr(E H Eᵀ).

Error feedback rounds every column once, in one order, on a grid that was fitted to the diagonal of H alone. From there
every sweep goes through the groups of columns again: the scale and the zero of a group go to the level that is nearest
to their joint optimum, then each of its columns to the codes that are best while all else stays (for codes: QuantEase,
Behdin et al. 2023, arXiv 2309.01885). Only what the 8-bit ranges of the grid can store is ever taken.

H E of the errors so far, kept up to date, gives every optimum; a group costs one product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import StoredLevels, from_groups
from lmq.quantizers.error_feedback import Lattice

_COLUMNS_AT_ONCE = 64
_LEAST_CURVATURE = 1e-6
"""Of a scale whose zero follows it, as a share of one whose zero stays: below, the codes of the group are all equal."""


@torch.no_grad()
def descend(
    weights: Tensor, grids: Sequence[CodedGrid], moments: Tensor, *, sweeps: int, tune_zeros: bool = True
) -> list[CodedGrid]:
    """Better codes, scales and zeros for `weights` [matrices, out_features, in_features], from those of `grids`.

    `moments` [matrices, in_features, in_features] are H, damped; the grids are of one group size. Scales and zeros stay
    where a group is no run of columns of one row: where groups straddle rows, and along axis 0. Without `tune_zeros`
    the zeros stay.
    """
    spec, axis, in_features = grids[0].spec, grids[0].axis, weights.shape[2]
    in_rows = axis == 1 and in_features % spec.group_size == 0
    width = spec.group_size if in_rows else _COLUMNS_AT_ONCE
    codes = torch.stack([_by_column(grid.codes(weight), grid) for grid, weight in zip(grids, weights, strict=True)])
    top = torch.tensor([float(2**grid.spec.bits - 1) for grid in grids], device=weights.device)[:, None]
    errors = torch.stack([(grid.round_trip(weight) - weight).t() for grid, weight in zip(grids, weights, strict=True)])
    gradient = torch.bmm(moments, errors)
    del errors
    groups = _Groups.of(grids) if in_rows else None
    lattices = [] if in_rows else [Lattice.of(grid) for grid in grids]
    for _ in range(sweeps):
        for start in range(0, in_features, width):
            columns = slice(start, min(start + width, in_features))
            block = _Block(codes[:, columns].float(), gradient[:, columns].clone(), moments[:, columns, columns])
            if groups is None:
                numbers = torch.arange(columns.start, columns.stop, device=weights.device)
                scale = torch.stack([lattice.at(numbers)[0] for lattice in lattices])
            else:
                scale = groups.tune(block, start // width, tune_zeros=tune_zeros).expand_as(block.codes)
            block.descend(scale, top)
            codes[:, columns] = block.codes.to(torch.uint8)
            gradient.baddbmm_(moments[:, :, columns], block.change)
    tuned = grids if groups is None else groups.stored(grids)
    return [CodedGrid.of(grid, matrix.t()) for grid, matrix in zip(tuned, codes, strict=True)]


def _by_column(codes: Tensor, grid: CodedGrid) -> Tensor:
    """Codes [groups, group_size] as [in_features, out_features]."""
    return from_groups(codes, grid.shape, grid.axis).t()


class _Block:
    """A run of columns of all matrices: `codes`, and H E at these columns, [matrices, columns, out_features] each.

    `moments` [matrices, columns, columns] are H within the run. `change` is what was added to the weights so far.
    """

    def __init__(self, codes: Tensor, gradient: Tensor, moments: Tensor):
        self.codes = codes
        self.gradient = gradient
        self.moments = moments
        self.change = torch.zeros_like(gradient)

    def add(self, change: Tensor) -> None:
        """Add to the weights."""
        self.change += change
        self.gradient.baddbmm_(self.moments, change)

    def descend(self, scale: Tensor, top: Tensor) -> None:
        """The best codes of one column after the other.

        `scale` [matrices, columns, out_features] of every weight, `top` [matrices, 1] the largest code.
        """
        inverse = torch.where(scale > 0, 1 / scale, 0)
        curvature = self.moments.diagonal(dim1=1, dim2=2)
        steps = torch.where(curvature > 0, 1 / curvature, 0)
        lowest = torch.zeros_like(top)
        for column in range(self.codes.shape[1]):
            code = self.codes[:, column]
            best = self.gradient[:, column] * inverse[:, column] * steps[:, column, None]
            best = (code - best).round_().clamp_(lowest, top)
            change = (best - code).mul_(scale[:, column])
            self.codes[:, column] = best
            self.change[:, column] += change
            self.gradient.addcmul_(self.moments[:, :, column, None], change[:, None])


@dataclass(frozen=True, eq=False)
class _Groups:
    """Codes of the scales and zeros of all matrices, and their levels.

    Float32 [matrices, groups of a row, out_features] each.
    """

    scale_codes: Tensor
    zero_codes: Tensor
    levels: StoredLevels

    @classmethod
    def of(cls, grids: Sequence[CodedGrid]) -> _Groups:
        """Those of grids whose groups are runs of columns of one row."""
        per_row = grids[0].shape[1] // grids[0].spec.group_size

        def by_row(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([each.float().view(-1, per_row).t() for each in values])

        levels = [grid.levels() for grid in grids]
        return cls(
            by_row([grid.scale_codes for grid in grids]),
            by_row([grid.zero_codes for grid in grids]),
            StoredLevels(
                by_row([each.bottom for each in levels]),
                by_row([each.step for each in levels]),
                *(
                    torch.stack(values)[:, None]
                    for values in zip(*((e.unit, e.zero_low, e.zero_step) for e in levels), strict=True)
                ),
            ),
        )

    def tune(self, block: _Block, number: int, *, tune_zeros: bool) -> Tensor:
        """The best scale and zero of one group of every row for the codes it has.

        Gives the scales [matrices, 1, out_features]. With free zeros, a scale is judged with the zero that suits it.
        """
        levels = replace(self.levels, bottom=self.levels.bottom[:, number], step=self.levels.step[:, number])
        scale, zero = levels.scale(self.scale_codes[:, number]), levels.zero(self.zero_codes[:, number])
        centred, of_zero = block.codes - zero[:, None], block.moments.sum((1, 2))[:, None]
        products = torch.bmm(block.moments, centred)
        slope, curvature = (block.gradient * centred).sum(1), (products * centred).sum(1)
        least = _LEAST_CURVATURE * curvature
        if tune_zeros:
            follows = torch.where(of_zero > 0, products.sum(1) / of_zero, 0)
            slope, curvature = slope - follows * block.gradient.sum(1), curvature - follows * products.sum(1)
        best = scale - slope / curvature
        usable = (scale > 0) & (best > 0) & (curvature > least)
        chosen = torch.where(usable, levels.scale_codes(torch.where(usable, best, 1)), self.scale_codes[:, number])
        moved = levels.scale(chosen)
        block.add((moved - scale)[:, None] * centred)
        self.scale_codes[:, number] = chosen
        if tune_zeros:
            best = zero + block.gradient.sum(1) / (moved * of_zero)
            usable = (moved > 0) & (of_zero > 0)
            chosen = torch.where(usable, levels.zero_codes(torch.where(usable, best, zero)), self.zero_codes[:, number])
            block.add(((zero - levels.zero(chosen)) * moved)[:, None].expand_as(centred))
            self.zero_codes[:, number] = chosen
        return moved[:, None]

    def stored(self, grids: Sequence[CodedGrid]) -> list[CodedGrid]:
        """The grids with these scales and zeros."""
        return [
            replace(grid, scale_codes=_flat(scales), zero_codes=_flat(zeros))
            for grid, scales, zeros in zip(grids, self.scale_codes, self.zero_codes, strict=True)
        ]


def _flat(codes: Tensor) -> Tensor:
    return codes.t().reshape(-1).to(torch.uint8)
