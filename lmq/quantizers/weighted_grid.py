"""Grids of least weighted squared error: the scale and the zero of every group, fitted to what its inputs matter.

Least Σ_i d_i (w_i − ŵ_i)² over a group. From several clips of the range from the smallest to the largest weight,
nearest codes and weighted least squares of scale and zero take turns; the best grid seen is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmq.formats.groups import group_blocks, to_groups
from lmq.formats.spec import QuantSpec

_CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
_ROUNDS = 3
_LEAST_IMPORTANCE = 1e-9
"""Of the mean: inputs that are never used still tell apart two grids that are equal otherwise."""


@torch.no_grad()
def fit_weighted(weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] of `weight` [out_features, in_features]; `importance` [in_features] is d ≥ 0.

    A group whose weights are all equal gets scale 1 and zero 0, which `lmq.formats.groups.encode` replaces.
    """
    groups = to_groups(weight.detach(), spec.group_size, axis)
    by_input = _normalised(importance.to(weight.device))
    scale, zero = torch.empty(len(groups), device=weight.device), torch.empty(len(groups), device=weight.device)
    for block in group_blocks(groups):
        columns = _columns(block, groups.shape, weight.shape[1], axis, weight.device)
        scale[block], zero[block] = _fit_block(groups[block].float(), by_input[columns], spec.bits)
    return scale, zero


def _normalised(importance: Tensor) -> Tensor:
    """Float32 with a mean near 1; all ones where nothing matters."""
    mean = importance.double().mean()
    if not float(mean) > 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance.double() / mean).float().clamp_min(_LEAST_IMPORTANCE)


def _columns(block: slice, shape: torch.Size, in_features: int, axis: int, device: torch.device) -> Tensor:
    """Which input every weight of a block of groups belongs to, int64 [groups of the block, group_size]."""
    groups, group_size = shape
    first = torch.arange(groups, device=device)[block, None]
    member = torch.arange(group_size, device=device)
    flat = first * group_size + member if axis == 1 else member * groups + first
    return flat % in_features


def _fit_block(weights: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] for weights and importance [groups, group_size]."""
    top = 2**bits - 1
    low, high = weights.amin(1), weights.amax(1)
    middle = (high + low) / 2
    total = importance.sum(1)
    mean = (importance * weights).sum(1) / total
    centred = weights - mean[:, None]
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for clip in _CLIPS:
        scale = (high - low) * (clip / top)
        zero = top / 2 - middle / scale
        for step in range(_ROUNDS):
            codes = (weights / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, top)
            residual = (codes - zero[:, None]).mul_(scale[:, None]).sub_(weights)
            error = residual.square_().mul_(importance).sum(1)
            better = error < best_error  # never for the NaN of a group without spread
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            if step + 1 < _ROUNDS:
                scale, zero = _refit(codes, centred, mean, importance, total, (scale, zero))
    return best_scale, best_zero


def _refit(
    codes: Tensor, centred: Tensor, mean: Tensor, importance: Tensor, total: Tensor, last: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Weighted least squares of scale and zero for these codes; the last ones where all codes are equal."""
    mean_code = (importance * codes).sum(1) / total
    steps = codes - mean_code[:, None]
    weighted = steps * importance
    variance = (weighted * steps).sum(1)
    scale = (weighted * centred).sum(1) / variance
    usable = (variance > 0) & (scale > 0)
    scale = torch.where(usable, scale, last[0])
    return scale, torch.where(usable, mean_code - mean / scale, last[1])
