"""Coordinate descent on what a quantized matrix stores: its codes, scales and zeros, for the least tr(E H Eᵀ).

Error feedback rounds every column once, in one order, on a grid that was fitted to the diagonal of H alone. From there
every sweep goes through the groups of columns again: the scale and the zero of a group go to the level that is nearest
to their joint optimum, then each of its columns to the codes that are best while all else stays (for codes: QuantEase,
Behdin et al. 2023, arXiv 2309.01885). Only what the 8-bit ranges of the grid can store is ever taken.

H E of the errors so far gives every optimum; it is taken for one group of columns at a time, when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmq.formats.coded_grid import CodedGrid
from lmq.formats.gguf_types import GgufGrid, GgufLevels
from lmq.formats.groups import StoredLevels, from_groups
from lmq.quantizers.error_feedback import EvenSteps, Lattice, Steps

_COLUMNS_AT_ONCE = 64
_COLUMNS_IN_TURN = 8
"""Columns whose changes reach the rest of their group in one product: what changes column by column stays in cache."""
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
    codes = torch.stack([_by_column(grid.codes(weight), grid) for grid, weight in zip(grids, weights, strict=True)])
    errors = torch.stack([(grid.round_trip(weight) - weight).t() for grid, weight in zip(grids, weights, strict=True)])
    scales = _grid_groups(grids) if in_rows else [Lattice.of(grid) for grid in grids]
    steps = EvenSteps.of_bits([grid.spec.bits for grid in grids], weights.device)
    sweep(codes, errors, moments, scales, steps, sweeps=sweeps, tune_zeros=tune_zeros)
    tuned = grids
    if isinstance(scales, Groups):
        tuned = [
            replace(grid, scale_codes=_flat(scale_codes), zero_codes=_flat(zero_codes))
            for grid, scale_codes, zero_codes in zip(grids, scales.scale_codes, scales.zero_codes, strict=True)
        ]
    return [CodedGrid.of(grid, matrix.t()) for grid, matrix in zip(tuned, codes, strict=True)]


@torch.no_grad()
def descend_gguf(
    weights: Tensor, grids: Sequence[GgufGrid], codes: Sequence[Tensor], moments: Tensor, steps: Steps, *, sweeps: int
) -> tuple[list[GgufGrid], list[Tensor]]:
    """The same for matrices in one type of GGUF: d and e stay where groups have integers of their own.

    `codes` uint8 [out_features, in_features] of each matrix.
    """
    kind, (out_features, in_features) = grids[0].kind, grids[0].shape
    per_row = in_features // kind.group_size

    def by_row(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([each.float().view(out_features, per_row).t() for each in values])

    def of_groups(unit: Tensor) -> Tensor:
        return unit[:, None].expand(-1, kind.groups_per_block).reshape(-1)

    units = by_row([of_groups(grid.unit) for grid in grids])
    scales = units if kind.scales is None else by_row([grid.scales for grid in grids])
    minimum_units, zeros = None, by_row([grid.decode()[1] for grid in grids])
    if kind.has_minimum:
        minimum_units = by_row([of_groups(grid.minimum_unit) for grid in grids if grid.minimum_unit is not None])
        minima = [grid.minima for grid in grids if grid.minima is not None]
        zeros = minimum_units if kind.minima is None else by_row(minima)
    groups = Groups(scales.clone(), zeros.clone(), GgufLevels(kind, units, minimum_units))
    by_column = torch.stack([matrix.t() for matrix in codes])
    errors = torch.stack(
        [(grid.weights(matrix) - weight).t() for grid, matrix, weight in zip(grids, codes, weights, strict=True)]
    )
    sweep(by_column, errors, moments, groups, steps, sweeps=sweeps, tune_zeros=kind.has_minimum)
    tuned = []
    for grid, scale_codes, zero_codes in zip(grids, groups.scale_codes, groups.zero_codes, strict=True):
        s, m = (each.t().reshape(-1, kind.groups_per_block) for each in (scale_codes, zero_codes))
        grid = replace(grid, unit=s[:, 0]) if kind.scales is None else replace(grid, scales=s.to(torch.int16))
        if kind.minima is not None:
            grid = replace(grid, minima=m.to(torch.int16))
        elif kind.has_minimum:
            grid = replace(grid, minimum_unit=m[:, 0])
        tuned.append(grid)
    return tuned, [matrix.t() for matrix in by_column]


@torch.no_grad()
def sweep(
    codes: Tensor,
    errors: Tensor,
    moments: Tensor,
    scales: Groups | Sequence[Lattice],
    steps: Steps,
    *,
    sweeps: int,
    tune_zeros: bool,
) -> None:
    """Improve codes uint8 [matrices, in_features, out_features] in place, and scales and zeros where these are groups.

    `errors` E, float32 in that shape, are those of the codes given, and follow them. Scales of lattices stay.
    """
    in_features = codes.shape[1]
    groups = scales if isinstance(scales, Groups) else None
    width = _COLUMNS_AT_ONCE if groups is None else in_features // groups.scale_codes.shape[1]
    for _ in range(sweeps):
        for start in range(0, in_features, width):
            columns = slice(start, min(start + width, in_features))
            gradient = torch.bmm(moments[:, columns], errors)
            block = _Block(steps.of_codes(codes[:, columns]), gradient, moments[:, columns, columns])
            if isinstance(scales, Groups):
                scale = scales.tune(block, start // width, tune_zeros=tune_zeros).expand_as(block.steps)
            else:
                numbers = torch.arange(columns.start, columns.stop, device=codes.device)
                scale = torch.stack([lattice.at(numbers)[0] for lattice in scales])
            block.descend(scale, steps)
            codes[:, columns] = steps.codes(block.steps)
            errors[:, columns] += block.change


def _by_column(codes: Tensor, grid: CodedGrid) -> Tensor:
    """Codes [groups, group_size] as [in_features, out_features]."""
    return from_groups(codes, grid.shape, grid.axis).t()


class _Block:
    """A run of columns of all matrices: `steps` of the codes, and H E at these columns.

    [matrices, columns, out_features] each; `moments` [matrices, columns, columns] are H within the run. `change` is
    what was added to the weights so far.
    """

    def __init__(self, steps: Tensor, gradient: Tensor, moments: Tensor):
        self.steps = steps
        self.gradient = gradient
        self.moments = moments
        self.change = torch.zeros_like(gradient)

    def add(self, change: Tensor) -> None:
        """Add to the weights."""
        self.change += change
        self.gradient.baddbmm_(self.moments, change)

    def descend(self, scale: Tensor, steps: Steps) -> None:
        """The best codes of one column after the other; `scale` [matrices, columns, out_features] of every weight."""
        inverse = torch.where(scale != 0, 1 / scale, 0)
        curvature = self.moments.diagonal(dim1=1, dim2=2)
        inverse_curvature = torch.where(curvature > 0, 1 / curvature, 0)[:, :, None]
        width = self.steps.shape[1]
        for start in range(0, width, _COLUMNS_IN_TURN):
            turn, rest = slice(start, min(start + _COLUMNS_IN_TURN, width)), slice(start + _COLUMNS_IN_TURN, width)
            towards = inverse[:, turn] * inverse_curvature[:, turn]
            change = torch.empty_like(towards)
            for column in range(turn.stop - start):
                at, following = start + column, slice(start + column + 1, turn.stop)
                step = self.steps[:, at]
                best = steps.nearest(torch.addcmul(step, self.gradient[:, at], towards[:, column], value=-1))
                torch.sub(best, step, out=change[:, column]).mul_(scale[:, at])
                self.steps[:, at] = best
                self.gradient[:, following].addcmul_(self.moments[:, following, at, None], change[:, column, None])
            self.change[:, turn] += change
            self.gradient[:, rest].baddbmm_(self.moments[:, rest, turn], change)


@dataclass(frozen=True, eq=False)
class Groups:
    """Codes of the scales and zeros of all matrices, and their levels.

    Float32 [matrices, groups of a row, out_features] each.
    """

    scale_codes: Tensor
    zero_codes: Tensor
    levels: StoredLevels | GgufLevels

    def tune(self, block: _Block, number: int, *, tune_zeros: bool) -> Tensor:
        """The best scale and zero of one group of every row for the codes it has.

        Gives the scales [matrices, 1, out_features]. With free zeros, a scale is judged with the zero that suits it.
        """
        levels = self.levels.at(number)
        scale = levels.scale(self.scale_codes[:, number])
        zero = levels.zero(self.zero_codes[:, number], scale)
        centred, of_zero = block.steps - zero[:, None], block.moments.sum((1, 2))[:, None]
        products = torch.bmm(block.moments, centred)
        slope, curvature = (block.gradient * centred).sum(1), (products * centred).sum(1)
        least = _LEAST_CURVATURE * curvature
        if tune_zeros:
            follows = torch.where(of_zero > 0, products.sum(1) / of_zero, 0)
            slope, curvature = slope - follows * block.gradient.sum(1), curvature - follows * products.sum(1)
        best = scale - slope / curvature
        usable = (scale != 0) & (best.sign() == scale.sign()) & (curvature > least)
        chosen = torch.where(usable, levels.scale_codes(torch.where(usable, best, 1)), self.scale_codes[:, number])
        moved = levels.scale(chosen)
        block.add((moved - scale)[:, None] * centred)
        self.scale_codes[:, number] = chosen
        if tune_zeros:
            best = zero + block.gradient.sum(1) / (moved * of_zero)
            usable = (moved != 0) & (of_zero > 0)
            nearest = levels.zero_codes(torch.where(usable, best, zero), moved)
            chosen = torch.where(usable, nearest, self.zero_codes[:, number])
            block.add(((zero - levels.zero(chosen, moved)) * moved)[:, None].expand_as(centred))
            self.zero_codes[:, number] = chosen
        return moved[:, None]


def _grid_groups(grids: Sequence[CodedGrid]) -> Groups:
    """Those of grids whose groups are runs of columns of one row."""
    per_row = grids[0].shape[1] // grids[0].spec.group_size

    def by_row(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([each.float().view(-1, per_row).t() for each in values])

    levels = [grid.levels() for grid in grids]
    return Groups(
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


def _flat(codes: Tensor) -> Tensor:
    return codes.t().reshape(-1).to(torch.uint8)
