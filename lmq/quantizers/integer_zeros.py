"""Grids whose zeros are whole numbers, as kernels for integer weights hold them."""

from __future__ import annotations

import torch

from lmq.formats.groups import group_blocks, nearest_codes

SYMMETRIC_BITS = 8
"""Kernels subtract 128 from 8-bit codes and take no zeros of their own."""
_REFITS = 3


def nearest_zero(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest zero that kernels hold: a whole number from 0 to 2^bits - 1, and always 128 at 8 bits."""
    if bits == SYMMETRIC_BITS:
        return torch.full_like(zero, 2 ** (bits - 1))
    return zero.round().clamp(0, 2**bits - 1)


def whole_zeros(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid next to a fitted one with a zero that kernels hold (`nearest_zero`): scale and zero float32 [groups].

    The scale stays where such a zero is within half a step. Elsewhere, and where the grid is more than twice as wide as
    `groups` [groups, group_size] with 0 among them, it is the smallest such grid that covers these.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = groups.amin(1).float().clamp(max=0), groups.amax(1).float().clamp(min=0)
    nearest = nearest_zero(zero, bits)
    keep = ((nearest - zero).abs() <= 0.5) & (scale * top <= 2 * (high - low))
    if bits == SYMMETRIC_BITS:
        covering = torch.maximum(high / (top - middle), -low / middle)
    else:
        covering = (high - low) / top
    covering_zero = nearest_zero(torch.where(covering > 0, -low / covering, 0), bits)
    return torch.where(keep, scale, covering), torch.where(keep, nearest, covering_zero)


def refit_scale(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale float32 [groups] of least squared error for the codes that `groups` have, three times over.

    A whole zero moves the grid by up to half a step; the scale makes up for a part of what that costs.
    """
    refitted = scale.clone()
    for block in group_blocks(groups):
        weights, centre = groups[block].float(), zero[block, None]
        for _ in range(_REFITS):
            steps = nearest_codes(weights, refitted[block], zero[block], bits) - centre
            squares = steps.square().sum(1)
            fitted = (steps * weights).sum(1) / squares
            refitted[block] = torch.where(squares > 0, fitted, refitted[block])
    return refitted
