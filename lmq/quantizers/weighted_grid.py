"""Grids of least weighted squared error: the scale and the zero of every group, fitted to what its inputs matter.

Least Σ_i d_i (w_i − ŵ_i)² over a group. From several clips of the range from the smallest to the largest weight,
nearest codes and weighted least squares of scale and zero take turns; the best grid seen is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.formats.groups import group_blocks, to_groups
from lmq.formats.spec import QuantSpec

CLIPS = (1.0, 0.85, 0.7)
_ROUNDS = 4
_LEAST_IMPORTANCE = 1e-9
"""Of the mean: inputs that are never used still tell apart two grids that are equal otherwise."""


@torch.no_grad()
def fit_weighted(weight: Tensor, importance: Tensor, spec: QuantSpec, axis: int) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] of `weight` [out_features, in_features]; `importance` [in_features] is d ≥ 0.

    A group whose weights are all equal gets scale 1 and zero 0, which `lmq.formats.groups.encode` replaces.
    """
    groups = to_groups(weight.detach(), spec.group_size, axis)
    by_weight = to_groups(normalised(importance.to(weight.device)).expand_as(weight), spec.group_size, axis)
    scale, zero = torch.empty(len(groups), device=weight.device), torch.empty(len(groups), device=weight.device)
    for block in group_blocks(groups):
        scale[block], zero[block] = fit_groups(groups[block].float(), by_weight[block], spec.bits)
    return scale, zero


def normalised(importance: Tensor) -> Tensor:
    """Float32 with a mean near 1; all ones where nothing matters."""
    mean = importance.double().mean()
    if not float(mean) > 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance.double() / mean).float().clamp_min(_LEAST_IMPORTANCE)


def fit_groups(
    weights: Tensor, importance: Tensor, bits: int, *, clips: Sequence[float] = CLIPS
) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 [groups] for weights and importance [groups, group_size].

    `clips` are the shares of the range that are started from.
    """
    top = 2**bits - 1
    low, high = weights.amin(1), weights.amax(1)
    middle = (high + low) / 2
    groups = _Groups.of(weights, importance)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for clip in clips:
        scale = (high - low) * (clip / top)
        zero = top / 2 - middle / scale
        for _ in range(_ROUNDS):
            error, refitted = groups.round_and_refit(scale, zero, top)
            better = error < best_error  # never for the NaN of a group without spread
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            scale, zero = refitted
    return best_scale, best_zero


@dataclass(frozen=True, eq=False)
class _Groups:
    """Weights and importance [groups, group_size], and sums over each group that no grid changes, [groups]."""

    weights: Tensor
    importance: Tensor
    total: Tensor
    mean: Tensor
    centred: Tensor
    spread: Tensor

    @classmethod
    def of(cls, weights: Tensor, importance: Tensor) -> _Groups:
        total = importance.sum(1)
        mean = (importance * weights).sum(1) / total
        centred = weights - mean[:, None]
        return cls(weights, importance, total, mean, centred, (importance * centred.square()).sum(1))

    def round_and_refit(self, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Weighted squared error of a grid with nearest codes, and the grid of least squares for these codes.

        Both come from three sums over the codes. Where all codes are equal the grid stays.
        """
        codes = torch.addcmul(zero[:, None], self.weights, (1 / scale)[:, None]).round_().clamp_(0, top)
        weighted = codes * self.importance
        mean_code = weighted.sum(1) / self.total
        covariance = (weighted * self.centred).sum(1)
        variance = weighted.mul_(codes.sub_(mean_code[:, None])).sum(1)
        offset = scale * (mean_code - zero) - self.mean
        error = scale * (scale * variance - 2 * covariance) + self.spread + self.total * offset.square()
        fitted = covariance / variance
        usable = (variance > 0) & (fitted > 0)
        fitted = torch.where(usable, fitted, scale)
        return error, (fitted, torch.where(usable, mean_code - self.mean / fitted, zero))
