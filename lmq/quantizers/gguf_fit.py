"""Grids of GGUF types of least weighted squared error, as they are stored.

Least Σ_i d_i (w_i − ŵ_i)² over a block, d_i the importance of input i. Scale and minimum of every group are fitted
first as if they could be stored freely. Then d and e of the block are searched so that the integers of its groups come
near: with the codes fixed, the error is a quadratic of scale and minimum, so that a candidate costs a few products per
group. With the grid found, codes, the groups' own optimum and the search take turns; the best grid seen is kept.

Units of one byte (mxfp4, nvfp4) are few: all those near the one that covers a block are tried, with their own codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lmq.formats.gguf_types import ByteFloat, GgufGrid, GgufMatrix, GgufType, as_float16
from lmq.quantizers.error_feedback import EvenSteps, Steps, UnevenSteps
from lmq.quantizers.weighted_grid import fit_groups, normalised

_WEIGHTS_AT_ONCE, _WEIGHTS_AT_ONCE_ON_GPU = 1 << 19, 1 << 24
_CLIPS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7, 0.55), 4: (1.0, 0.85, 0.7), 5: (1.0, 0.9), 6: (1.0, 0.9)}
"""Of the scale that covers a group, by bits; 1 for others."""
_RANGE_CLIPS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Of the range of a group that has a minimum."""
_ROUNDS = 3
_CANDIDATES = 12
"""Units of a block that are tried: those by which its largest integer is from the largest there is to _LEAST of it."""
_LEAST = 0.65
_BYTES_TRIED = {0: range(-2, 2), 3: range(-8, 7)}
"""Bytes of units that are tried from the one that covers a block on, by bits of their mantissa."""


@torch.no_grad()
def fit_type(weight: Tensor, importance: Tensor, kind: GgufType) -> GgufGrid:
    """The grid of `weight` [out_features, in_features], rows of whole blocks; `importance` [in_features] is d ≥ 0."""
    out_features, in_features = weight.shape
    shape = (-1, kind.groups_per_block, kind.group_size)
    by_input = normalised(importance.to(weight.device))
    rows = max(1, (_WEIGHTS_AT_ONCE_ON_GPU if weight.is_cuda else _WEIGHTS_AT_ONCE) // in_features)
    largest = weight.detach().abs().max().float()
    found = []
    for piece in weight.detach().split(rows):
        blocks = piece.float().reshape(shape)
        found.append(_fit_blocks(_Blocks(blocks, by_input.expand_as(piece).reshape(shape), kind), largest))
    return GgufGrid(
        kind,
        (out_features, in_features),
        torch.cat([each.unit for each in found]),
        torch.cat([each.scales for each in found]).to(torch.int16),
        torch.cat([each.minimum_unit for each in found]) if kind.has_minimum else None,
        torch.cat([each.minima for each in found]).to(torch.int16) if kind.has_minimum else None,
    )


@torch.no_grad()
def nearest_matrix(weight: Tensor, importance: Tensor, kind: GgufType) -> GgufMatrix:
    """The matrix [out_features, in_features] with the codes that are nearest on its grid of `fit_type`."""
    grid = fit_type(weight, importance, kind)
    scale, zero = (values[:, None] for values in grid.decode())
    values = weight.float().view(-1, kind.group_size) * torch.where(scale != 0, 1 / scale, 0) + zero
    steps = steps_of(kind, weight.device)
    return GgufMatrix.of(grid, steps.codes(steps.nearest(values)))


def steps_of(kind: GgufType, device: torch.device) -> Steps:
    """How codes of a type are rounded: to whole steps from 0, or to the levels of one whose levels are uneven."""
    if kind.is_even:
        return EvenSteps.of_bits([kind.bits], device)
    return UnevenSteps(torch.tensor(kind.levels, dtype=torch.float32, device=device))


@dataclass(frozen=True, eq=False)
class _Stored:
    """d, e float32 [blocks], and s, m float32 [blocks, groups] of whole numbers."""

    unit: Tensor
    scales: Tensor
    minimum_unit: Tensor
    minima: Tensor

    @property
    def values(self) -> tuple[Tensor, Tensor]:
        """Scale and minimum of every group [blocks, groups]."""
        return self.unit[:, None] * self.scales, self.minimum_unit[:, None] * self.minima

    def where(self, better: Tensor, other: _Stored) -> _Stored:
        """The other for the blocks where it is better."""
        return _Stored(
            torch.where(better, other.unit, self.unit),
            torch.where(better[:, None], other.scales, self.scales),
            torch.where(better, other.minimum_unit, self.minimum_unit),
            torch.where(better[:, None], other.minima, self.minima),
        )


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Weights and importance [blocks, groups, group_size]."""

    weights: Tensor
    importance: Tensor
    kind: GgufType

    def levels(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Levels nearest to the weights on the grids of scale and minimum [blocks, groups]."""
        inverse = torch.where(scale != 0, 1 / scale, 0)
        values = (self.weights + minimum[..., None]) * inverse[..., None]
        if self.kind.is_even:
            return values.round_().clamp_(self.kind.levels[0], self.kind.levels[-1])
        return steps_of(self.kind, values.device).nearest(values)

    def sums(self, levels: Tensor) -> _Sums:
        """What the error depends on while these levels stay."""
        weighted, products = self.importance * self.weights, self.importance * levels
        return _Sums(
            self.importance.sum(2),
            products.sum(2),
            (products * levels).sum(2),
            weighted.sum(2),
            (weighted * levels).sum(2),
            (weighted * self.weights).sum(2),
        )


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over groups weighted by importance, of 1, l, l², w, w l, w² for levels l, weights w: [blocks, groups]."""

    ones: Tensor
    levels: Tensor
    squares: Tensor
    weights: Tensor
    products: Tensor
    weight_squares: Tensor

    def error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Σ d (w − (scale · l − minimum))² of every group."""
        return (
            self.weight_squares
            + scale * (scale * self.squares - 2 * self.products - 2 * minimum * self.levels)
            + minimum * (2 * self.weights + minimum * self.ones)
        )

    def best_minimum(self, scale: Tensor) -> Tensor:
        """The minimum of least error beside a scale."""
        return (scale * self.levels - self.weights) / self.ones

    def best(self, scale: Tensor, minimum: Tensor, *, free: bool) -> tuple[Tensor, Tensor]:
        """Scale and minimum of least error, the given ones where levels do not tell; without `free` no minimum."""
        if not free:
            best = self.products / self.squares
            return torch.where((self.squares > 0) & (best != 0), best, scale), minimum
        mean = self.levels / self.ones
        variance = self.squares - self.levels * mean
        best = (self.products - self.weights * mean) / variance
        best = torch.where((variance > 1e-6 * self.squares) & (best > 0), best, scale)
        return best, self.best_minimum(best)


def _fit_blocks(blocks: _Blocks, largest: Tensor) -> _Stored:
    """What is stored for the blocks; `largest` [] is the largest size of the matrix's weights."""
    kind = blocks.kind
    if kind.unit is not None:
        return _best_bytes(blocks, kind.unit, largest)
    scale, minimum = _free_minimum(blocks) if kind.has_minimum else _free_scale(blocks)
    best: _Stored | None = None
    best_error = torch.full_like(scale[:, 0], torch.inf)
    sums = blocks.sums(blocks.levels(scale, minimum))
    for _ in range(_ROUNDS):
        found = _store(kind, sums, scale, minimum)
        values = found.values
        sums = blocks.sums(blocks.levels(*values))
        error = sums.error(*values).sum(1)
        better = error < best_error
        best = found if best is None else best.where(better, found)
        best_error = torch.where(better, error, best_error)
        scale, minimum = sums.best(*values, free=kind.has_minimum)
        if kind.minima is not None:
            minimum = minimum.clamp_min(0)
    assert best is not None
    return best


def _best_bytes(blocks: _Blocks, unit: ByteFloat, largest: Tensor) -> _Stored:
    """Units of one byte for blocks of one group, within the span of the matrix, of least error with nearest codes."""
    top, tried = blocks.kind.levels[-1], _BYTES_TRIED[unit.mantissa]
    least = unit.byte(unit.value(unit.byte(largest / top) + tried[-1]) / unit.span)
    covering = unit.byte(blocks.weights.abs().amax(2) / top)
    zeros = torch.zeros(covering.shape, device=covering.device)
    best, best_error = unit.value(covering), torch.full_like(zeros, torch.inf)
    for step in tried:
        scale = unit.value((covering + step).maximum(least).clamp_max(254))
        error = blocks.sums(blocks.levels(scale, zeros)).error(scale, zeros)
        best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)
    return _Stored(best[:, 0], torch.ones_like(best), zeros[:, 0], zeros)


def _free_minimum(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Scale ≥ 0 and minimum [blocks, groups] of every group by itself; no minimum below 0 where none can be stored."""
    kind, shape = blocks.kind, blocks.weights.shape[:2]
    weights, importance = (each.reshape(-1, kind.group_size) for each in (blocks.weights, blocks.importance))
    scale, zero = fit_groups(weights, importance, kind.bits, clips=_RANGE_CLIPS)
    low, high = weights.amin(1), weights.amax(1)
    constant, top = low == high, kind.levels[-1]
    scale = torch.where(constant, high.clamp_min(0) / top, scale)
    minimum = torch.where(constant, (-high).clamp_min(0), zero * scale)
    if kind.minima is not None and bool((positive := (minimum < 0)).any()):
        whole = replace(blocks, weights=weights[positive][:, None], importance=importance[positive][:, None])
        scale[positive], minimum[positive] = (each.view(-1) for each in _free_scale(whole))
    return scale.view(shape), minimum.view(shape)


def _free_scale(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Scale [blocks, groups] of every group by itself, of either sign where levels are, and a minimum of 0."""
    lowest, highest = blocks.kind.levels[0], blocks.kind.levels[-1]
    extreme = blocks.weights.gather(2, blocks.weights.abs().argmax(2, keepdim=True))[..., 0]
    minimum = torch.zeros_like(extreme)
    best, best_error = minimum, torch.full_like(extreme, torch.inf)
    for end in (lowest, highest) if lowest else (highest,):
        for clip in _CLIPS.get(blocks.kind.bits, (1.0,)):
            scale = extreme * (clip / end)
            for _ in range(_ROUNDS):
                sums = blocks.sums(blocks.levels(scale, minimum))
                error = sums.error(scale, minimum)
                best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)
                scale, _ = sums.best(scale, minimum, free=False)
    return best, minimum


def _store(kind: GgufType, sums: _Sums, scale: Tensor, minimum: Tensor) -> _Stored:
    """What can be stored near to scale and minimum [blocks, groups], of least error with the levels of the sums."""
    ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
    if kind.scales is None:
        unit = as_float16(scale)
        if not kind.has_minimum:
            return _Stored(unit[:, 0], ones, zeros[:, 0], zeros)
        unit = unit.clamp_min(2.0**-24)
        return _Stored(unit[:, 0], ones, as_float16(sums.best_minimum(unit))[:, 0], ones)
    if kind.minima is None:
        largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
        unit, scales = _best_unit(largest, scale, kind.scales, lambda each: sums.error(each, zeros))
        return _Stored(unit, scales, zeros[:, 0], zeros)
    low, high = max(1, kind.scales[0]), kind.scales[1]

    def with_best_minimum(each: Tensor) -> Tensor:
        return sums.error(each, sums.best_minimum(each).clamp_min(0))

    unit, scales = _best_unit(scale.amax(1), scale, (low, high), with_best_minimum)
    unit = unit.clamp_min(2.0**-24)
    stored = unit[:, None] * scales
    depth = sums.best_minimum(stored).clamp_min(0)
    minimum_unit, minima = _best_unit(depth.amax(1), depth, kind.minima, partial(sums.error, stored))
    return _Stored(unit, scales, minimum_unit, minima)


def _best_unit(
    largest: Tensor, values: Tensor, integers: tuple[int, int], error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A float16 unit [blocks] and whole numbers [blocks, groups] whose products with it have the least error.

    `largest` [blocks] of the `values` [blocks, groups] becomes a number near one end of `integers`.
    """
    best_unit, best_numbers = torch.zeros_like(largest), values.new_zeros(values.shape).clamp_(*integers)
    best_error = error(best_unit[:, None] * best_numbers).sum(1)
    for end in integers if integers[0] < 0 else integers[1:]:
        for share in torch.linspace(1, _LEAST, _CANDIDATES).tolist():
            unit = as_float16(largest / (end * share))
            inverse = torch.where(unit != 0, 1 / unit, 0)[:, None]
            numbers = (values * inverse).round_().clamp_(*integers)
            found = error(unit[:, None] * numbers).sum(1)
            better = found < best_error
            best_unit = torch.where(better, unit, best_unit)
            best_numbers = torch.where(better[:, None], numbers, best_numbers)
            best_error = torch.where(better, found, best_error)
    return best_unit, best_numbers
