"""Grids whose zeros are whole numbers, as kernels for integer weights hold them."""

from __future__ import annotations

from typing import Literal

import torch

from lmq.errors import InputError
from lmq.formats.groups import group_blocks, nearest_codes

IntegerZeros = bool | Literal["middle"]
"""Whether zeros are whole numbers; "middle": all of them 2^(bits - 1), as in symmetric checkpoints."""

SYMMETRIC_BITS = 8
"""Kernels subtract 128 from 8-bit codes and take no zeros of their own."""
_REFITS = 3
_NARROWEST, _SHARES = 0.3, 36
"""Shares of the scale that covers a group, evenly: those that are tried for symmetric grids."""


def require_integer_zeros(value: object) -> None:
    """Raise InputError for what is no `IntegerZeros`."""
    if value not in (False, True, "middle"):
        raise InputError(f"integer_zeros = {value!r} is not allowed; allowed: false, true, middle")


def nearest_zero(zero: torch.Tensor, bits: int, zeros: IntegerZeros = True) -> torch.Tensor:
    """The nearest zero that kernels hold: a whole number from 0 to 2^bits - 1, and always 128 at 8 bits."""
    if bits == SYMMETRIC_BITS or zeros == "middle":
        return torch.full_like(zero, 2 ** (bits - 1))
    return zero.round().clamp(0, 2**bits - 1)


def whole_zeros(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, zeros: IntegerZeros = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid next to a fitted one with a zero that kernels hold (`nearest_zero`): scale and zero float32 [groups].

    The scale stays where such a zero is within half a step. Elsewhere, and where the grid is more than twice as wide as
    `groups` [groups, group_size] with 0 among them, it is the smallest such grid that covers these. With zeros in the
    middle it is the one of least squared error among those that cover these and narrower ones.
    """
    if zeros == "middle":
        return _narrowed(groups, bits), nearest_zero(zero, bits, zeros)
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


def _narrowed(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale float32 [groups] of least squared error with the zero in the middle, of shares of the one that covers all.

    Of few bits the grid that covers all is far too wide: it has one code above the middle at 2 bits.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    best = torch.zeros(len(groups), device=groups.device)
    for block in group_blocks(groups):
        weights = groups[block].float()
        covering = torch.maximum(weights.amax(1) / (top - middle), -weights.amin(1) / middle).clamp(min=0)
        zero = torch.full_like(covering, middle)
        least = torch.full_like(covering, torch.inf)
        for share in torch.linspace(_NARROWEST, 1, _SHARES).tolist():
            scale = covering * share
            codes = nearest_codes(weights, scale, zero, bits)
            error = codes.sub_(middle).mul_(scale[:, None]).sub_(weights).square_().sum(1)
            best[block] = torch.where(error < least, scale, best[block])
            least = torch.minimum(error, least)
    return best


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
