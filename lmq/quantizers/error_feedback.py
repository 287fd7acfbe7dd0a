"""Error feedback (GPTQ, Frantar et al. 2023, arXiv 2210.17323): what rounding one column costs, later columns make up.

With H the second moments of a matrix's inputs, columns are rounded one after the other on grids that are fixed
beforehand, as stored: 8-bit scales and zeros included, so that their rounding is made up for as well. The error of
column j, divided by U_jj, times row j of U, is subtracted from the columns that follow, where U is the upper Cholesky
factor of the inverse of H + λ · mean(diag H) · I.

Groups stay where they are: only the order of rounding changes, most important columns first. So groups of any size
may straddle rows. Inputs that are never used (H_jj = 0) are rounded to their nearest codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
_MOST_COPIED_INPUTS = 4096
"""Above, U takes the place of H ordered and damped: a matrix of 28,672 inputs has 3.3 GB."""
_FACTORED_AT_ONCE = 2048
_VALUES_AT_ONCE = 1 << 24
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
    mean = diagonal.double().mean().item()

    def in_order(of: Tensor) -> Tensor:
        ordered = torch.empty(in_features, in_features, dtype=dtype, device=moments.device)
        for rows, part in zip(
            ordered.split(_rows_at_once(in_features)), of.split(_rows_at_once(in_features)), strict=True
        ):
            rows.copy_(moments[part][:, of])
        if mean > 0:
            ordered.div_(mean)
        ordered.diagonal().add_((diagonal[of] == 0).to(dtype))
        return ordered

    if in_features > _MOST_COPIED_INPUTS and not moments.is_cuda:
        factor = _inverse_factor_in_place(lambda: in_order(columns.flip(0)), damping)
    else:
        factor = _inverse_factor(in_order(columns), damping)
    return Feedback(columns, factor.float())


def feedback_bytes(in_features: int) -> int:
    """Bytes of what `feedback_of` holds at most on a CPU, H of one matrix included."""
    numbers = in_features**2
    number_bytes = 8 if in_features <= _MOST_DOUBLE_INPUTS else 4
    copies = 1 if in_features > _MOST_COPIED_INPUTS else 5
    return numbers * (4 + copies * number_bytes + (4 if number_bytes == 8 else 0))


def _rows_at_once(in_features: int) -> int:
    return max(1, _VALUES_AT_ONCE // in_features)


def damped_moments(moments: Tensor, damping: float) -> Tensor:
    """H divided by its mean diagonal, plus λ I, float32 [in_features, in_features]; λ I where nothing comes in."""
    mean = moments.diagonal().double().mean().item()
    damped = moments.float() / mean if mean > 0 else torch.zeros_like(moments, dtype=torch.float32)
    damped.diagonal().add_(damping)
    return damped


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
        damping = _raised(damping, matrix.dtype)
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _inverse_factor_in_place(reversed_matrix: Callable[[], Tensor], damping: float) -> Tensor:
    """The same in the memory of one matrix, which is given with its rows and columns reversed, anew for every damping.

    By blocks: the matrix becomes its lower Cholesky factor, then the inverse of that. Its values in reverse are the
    inverse with rows and columns reversed.
    """
    while True:
        matrix = reversed_matrix()
        matrix.diagonal().add_(damping)
        if _factor_in_place(matrix):
            break
        damping = _raised(damping, matrix.dtype)
    _invert_in_place(matrix)
    _reverse(matrix.view(-1))
    return matrix


def _factor_in_place(matrix: Tensor) -> bool:
    """Make the lower triangle that of the Cholesky factor; False where there is none."""
    for block in _blocks(len(matrix)):
        lower, failed = torch.linalg.cholesky_ex(matrix[block, block])
        if bool(failed) or not bool(lower.isfinite().all()):
            return False
        matrix[block, block] = lower
        below = matrix[block.stop :, block]
        if len(below):
            below.copy_(torch.linalg.solve_triangular(lower.t(), below, upper=True, left=False))
        for rows in _blocks(len(below)):
            # what is above the diagonal is never read
            rest = matrix[block.stop + rows.start : block.stop + rows.stop, block.stop : block.stop + rows.stop]
            rest.addmm_(below[rows], below[: rows.stop].t(), alpha=-1)
    return True


def _invert_in_place(matrix: Tensor) -> None:
    """Make a lower triangle its inverse, and zeros of what is above it."""
    for block in _blocks(len(matrix)):
        identity = torch.eye(block.stop - block.start, dtype=matrix.dtype)
        inverse = torch.linalg.solve_triangular(matrix[block, block], identity, upper=False)
        before = matrix[: block.start, : block.start]
        matrix[block, : block.start] = -(inverse @ (matrix[block, : block.start] @ before))
        matrix[block, block] = inverse
        matrix[block, block.stop :] = 0


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _FACTORED_AT_ONCE, size)) for start in range(0, size, _FACTORED_AT_ONCE))


def _raised(damping: float, dtype: torch.dtype) -> float:
    """The next damping to try. Raises ArithmeticError where none can help."""
    if damping > _MOST_DAMPING:
        raise ArithmeticError("second moments that are not finite")
    return max(10 * damping, float(torch.finfo(dtype).eps))


def _reverse(values: Tensor) -> None:
    """Reverse a vector in place."""
    for start in range(0, len(values) // 2, _VALUES_AT_ONCE):
        stop = min(start + _VALUES_AT_ONCE, len(values) // 2)
        front, back = values[start:stop], values[len(values) - stop : len(values) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices as one tensor [matrices, ...]; a single one, which may be large, is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


@dataclass(frozen=True, eq=False)
class EvenSteps:
    """Codes that stand for whole steps: 0 to `top` [matrices, 1]."""

    top: Tensor

    @classmethod
    def of_bits(cls, bits: Sequence[int], device: torch.device) -> EvenSteps:
        """Those of matrices with codes of so many bits."""
        return cls(torch.tensor([float(2**width - 1) for width in bits], device=device)[:, None])

    def nearest(self, values: Tensor) -> Tensor:
        """The steps nearest to values [matrices, ...] that are used up."""
        return values.round_().clamp_(torch.zeros_like(self.top), self.top)

    def of_codes(self, codes: Tensor) -> Tensor:
        """Steps of codes uint8, float32."""
        return codes.float()

    def codes(self, steps: Tensor) -> Tensor:
        """Codes uint8 of steps."""
        return steps.to(torch.uint8)


@dataclass(frozen=True, eq=False)
class UnevenSteps:
    """Codes that stand for the entries of a table `steps`, in rising order."""

    steps: Tensor

    @property
    def _middles(self) -> Tensor:
        return (self.steps[1:] + self.steps[:-1]) / 2

    def nearest(self, values: Tensor) -> Tensor:
        """The steps nearest to values."""
        return self.steps[torch.bucketize(values, self._middles, out_int32=True)]

    def of_codes(self, codes: Tensor) -> Tensor:
        """Steps of codes uint8, float32."""
        return self.steps[codes.int()]

    def codes(self, steps: Tensor) -> Tensor:
        """Codes uint8 of steps."""
        return torch.bucketize(steps, self._middles, out_int32=True).to(torch.uint8)


Steps = EvenSteps | UnevenSteps


@torch.no_grad()
def round_with_feedback(weights: Tensor, grids: Sequence[Grid], feedbacks: Sequence[Feedback]) -> list[CodedGrid]:
    """Codes of `weights` [matrices, out_features, in_features], each on its own grid, of any configuration.

    The matrices go through the columns together: the loop takes little longer for many than for one.
    """
    steps = EvenSteps.of_bits([grid.spec.bits for grid in grids], weights.device)
    codes = codes_with_feedback(weights, [Lattice.of(grid) for grid in grids], steps, feedbacks)
    return [CodedGrid.of(grid, matrix) for grid, matrix in zip(grids, codes, strict=True)]


@torch.no_grad()
def codes_with_feedback(
    weights: Tensor, lattices: Sequence[Lattice], steps: Steps, feedbacks: Sequence[Feedback]
) -> list[Tensor]:
    """The same on lattices of any kind: codes uint8 [out_features, in_features] of each matrix."""
    order = torch.stack([feedback.order for feedback in feedbacks])
    factor = stacked([feedback.factor for feedback in feedbacks])
    in_features = weights.shape[2]
    remaining = torch.stack([weight.float().t()[of] for weight, of in zip(weights, order, strict=True)])
    codes = torch.empty(remaining.shape, dtype=torch.uint8, device=weights.device)
    for start in range(0, in_features, _COLUMNS_AT_ONCE):
        columns = slice(start, min(start + _COLUMNS_AT_ONCE, in_features))
        stored = order[:, columns]
        by_matrix = [lattice.at(of_matrix) for lattice, of_matrix in zip(lattices, stored, strict=True)]
        scale, zero = (torch.stack(values) for values in zip(*by_matrix, strict=True))
        block = remaining[:, columns]
        errors = _round_block(block, scale, zero, factor[:, columns, columns], steps, codes[:, columns])
        rest = slice(columns.stop, in_features)
        remaining[:, rest].baddbmm_(factor[:, columns, rest].transpose(1, 2), errors, alpha=-1)
    return [matrix[of.argsort()].t() for matrix, of in zip(codes, order, strict=True)]


@dataclass(frozen=True, eq=False)
class Lattice:
    """Scale and zero float32 [groups] of one matrix of `shape`, and where its weights find theirs."""

    scale: Tensor
    zero: Tensor
    shape: tuple[int, int]
    group_size: int
    axis: int = 1

    @classmethod
    def of(cls, grid: Grid) -> Lattice:
        """Those of a grid."""
        return cls(*grid.decode(), grid.shape, grid.spec.group_size, grid.axis)

    def at(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of the weights in `columns` int64 [columns]: float32 [columns, out_features] each."""
        out_features, in_features = self.shape
        if self.axis == 1 and in_features % self.group_size == 0:
            scale, zero = self._by_column
            groups = columns // self.group_size
            return scale[groups], zero[groups]
        shift = self.group_size.bit_length() - 1  # such sizes are powers of two: shifting is faster than dividing
        flat = torch.arange(out_features, device=columns.device) * in_features + columns[:, None]
        groups = flat >> shift if self.axis == 1 else flat % len(self.scale)
        return self.scale[groups], self.zero[groups]

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor]:
        """[groups of a row, out_features]: what a column needs lies together."""
        scale, zero = (values.view(self.shape[0], -1).t().contiguous() for values in (self.scale, self.zero))
        return scale, zero


def _round_block(block: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, steps: Steps, codes: Tensor) -> Tensor:
    """Errors / U_jj float32 [matrices, columns, out_features] of a block of columns; its `codes` are written.

    `block`, in that shape, is used up; `factor` [matrices, columns, columns] is U within it.
    """
    inverse = torch.where(scale != 0, 1 / scale, 0)
    errors = torch.empty_like(block)
    for column in range(block.shape[1]):
        weight = block[:, column]
        step = steps.nearest(torch.mul(weight, inverse[:, column]).add_(zero[:, column]))
        codes[:, column] = steps.codes(step)
        error = (weight - (step - zero[:, column]).mul_(scale[:, column])).div_(factor[:, column, column, None])
        errors[:, column] = error
        following = slice(column + 1, None)
        block[:, following].addcmul_(factor[:, column, following, None], error[:, None], value=-1)
    return errors
