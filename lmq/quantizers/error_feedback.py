"""Error feedback (GPTQ, Frantar et al. 2023, arXiv 2210.17323): what rounding one column costs, later columns make up.

With H the second moments of a matrix's inputs, columns are rounded one after the other on grids that are fixed
beforehand, as stored: 8-bit scales and zeros included, so that their rounding is made up for as well. The error of
column j, divided by U_jj, times row j of U, is subtracted from the columns that follow, where U is the upper Cholesky
factor of the inverse of H + λ · mean(diag H) · I.

Groups stay where they are: only the order of rounding changes, most important columns first. So groups of any size
may straddle rows. Inputs that are never used (H_jj = 0) are rounded to their nearest codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import Grid

Order = Literal["descending", "stored"]
"""Columns in descending H_jj, or as they are."""

_COLUMNS_AT_ONCE = 64
"""Columns whose errors reach those beyond them in one matrix product."""
_MOST_DOUBLE_INPUTS = 8192
"""Above, U is computed in float32: in float64 it would take 2 GB at 16,384 inputs."""
_MOST_DAMPING = 1e6


@dataclass(frozen=True, eq=False)
class Feedback:
    """In which order the columns of one matrix are rounded, int64 [in_features], and U in that order, float32."""

    order: Tensor
    factor: Tensor


@torch.no_grad()
def feedback_of(moments: Tensor, *, damping: float, order: Order = "descending") -> Feedback:
    """Order and U for second moments H [in_features, in_features], symmetric, of any scale.

    Damping is raised tenfold until the matrix is positive definite in floating point: with few tokens and a tiny λ it
    is not.
    """
    in_features = len(moments)
    dtype = torch.float64 if in_features <= _MOST_DOUBLE_INPUTS else torch.float32
    diagonal = moments.diagonal()
    columns = (
        torch.argsort(diagonal, descending=True, stable=True)
        if order == "descending"
        else torch.arange(in_features, device=moments.device)
    )
    ordered = moments[columns][:, columns].to(dtype)
    mean = diagonal.double().mean().item()
    if mean > 0:
        ordered.div_(mean)
    ordered.diagonal().add_((diagonal[columns] == 0).to(dtype))
    return Feedback(columns, _inverse_factor(ordered, damping).float())


def _inverse_factor(matrix: Tensor, damping: float) -> Tensor:
    """U, upper triangular with UᵀU = (matrix + λ I)⁻¹, for a matrix whose mean diagonal is about 1.

    The Cholesky factor of the matrix with rows and columns reversed, reversed again, is R, upper triangular with
    R Rᵀ = matrix; and U = R⁻¹. That takes less than half of the work of inverting first, and rounds less.
    """
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not bool(failed) and bool(lower.isfinite().all()):
            break
        if damping > _MOST_DAMPING:
            raise ArithmeticError("second moments that are not finite")
        damping = max(10 * damping, float(torch.finfo(matrix.dtype).eps))
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


@torch.no_grad()
def round_with_feedback(weights: Tensor, grids: Sequence[Grid], feedbacks: Sequence[Feedback]) -> list[CodedGrid]:
    """Codes of `weights` [matrices, out_features, in_features] on one grid each, all of the same configuration.

    The matrices go through the columns together: the loop takes the same time for one as for many.
    """
    order = torch.stack([feedback.order for feedback in feedbacks])
    factor = torch.stack([feedback.factor for feedback in feedbacks])
    decoded = [grid.decode() for grid in grids]
    scale, zero = (torch.stack(values) for values in zip(*decoded, strict=True))
    matrices, out_features, in_features = weights.shape
    remaining = weights.float().gather(2, order[:, None].expand(weights.shape))
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    for start in range(0, in_features, _COLUMNS_AT_ONCE):
        columns = slice(start, min(start + _COLUMNS_AT_ONCE, in_features))
        stored = order[:, None, columns].expand(matrices, out_features, -1)
        groups = _groups_of(stored, grids[0]).transpose(1, 2).flatten(1)
        shape = (matrices, columns.stop - start, out_features)
        block_scale, block_zero = (values.gather(1, groups).view(shape) for values in (scale, zero))
        block = remaining[:, :, columns].transpose(1, 2).contiguous()
        chosen, errors = _round_block(block, block_scale, block_zero, factor[:, columns, columns], grids[0].spec.bits)
        codes.scatter_(2, stored, chosen.transpose(1, 2).to(torch.uint8))
        rest = slice(columns.stop, in_features)
        remaining[:, :, rest] -= errors.transpose(1, 2) @ factor[:, columns, rest]
    return [CodedGrid.of(grid, matrix) for grid, matrix in zip(grids, codes, strict=True)]


def _groups_of(columns: Tensor, grid: Grid) -> Tensor:
    """Group of every weight of some columns, int64 as `columns` [matrices, out_features, columns]."""
    rows = torch.arange(columns.shape[1], device=columns.device)[:, None]
    flat = rows * grid.shape[1] + columns
    return flat // grid.spec.group_size if grid.axis == 1 else flat % len(grid.scale_codes)


def _round_block(block: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and errors / U_jj float32 [matrices, columns, out_features] of a block of columns, which is used up.

    `factor` [matrices, columns, columns] is U within the block.
    """
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for column in range(block.shape[1]):
        weight = block[:, column]
        code = torch.mul(weight, inverse[:, column]).add_(zero[:, column]).round_().clamp_(0, 2**bits - 1)
        codes[:, column] = code
        error = (weight - (code - zero[:, column]).mul_(scale[:, column])).div_(factor[:, column, column, None])
        errors[:, column] = error
        following = slice(column + 1, None)
        block[:, following] -= factor[:, column, following, None] * error[:, None]
    return codes, errors
