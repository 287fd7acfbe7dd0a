"""Finds weights that already lie on a coarse grid, as those of a model that was opened from a quantized file.

GGUF's Q4_1, for one, keeps groups of 32 weights along in_features on 16 equally spaced values. A configuration whose
grid contains that one reproduces the weights for nothing, which says nothing about the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId

GROUP_SIZES = (256, 128, 64, 32, 16)
MOST_BITS = 8

_FIRST_GROUPS = 8
_SAMPLED_GROUPS = 1024
_ELEMENTS_AT_ONCE = 2**17
"""Weights times numbers of steps that are looked at together: 1 MB of float64."""
_LARGEST_TOLERANCE = 0.25
"""Distance from the grid, in steps, beyond which being near it would be chance."""


@dataclass(frozen=True)
class CoarseGrid:
    """Each `group_size` consecutive weights along in_features lie on at most `2**bits` equally spaced values."""

    bits: int
    group_size: int

    @property
    def bits_per_weight(self) -> float:
        """What the grid takes with a 16-bit scale and minimum per group, as in Q4_1: 5 for 4 bits in groups of 32."""
        return self.bits + 32 / self.group_size


def find_coarse_grid(weight: Tensor) -> CoarseGrid | None:
    """The grid of fewest bits per weight that `weight` [out_features, in_features] lies on; None if there is none.

    Judged by up to 1,024 groups spread over the matrix, and left at the first few that fail. A weight may be off the
    grid by what rounding to its storage type explains; a float32 tensor whose values all fit bfloat16 or float16
    counts as stored in that type. Steps that this rounding hides (8 bits in bfloat16) are not found.
    """
    candidates = (_grid_in_groups(weight.detach(), size) for size in GROUP_SIZES if weight.shape[1] % size == 0)
    found = [grid for grid in candidates if grid is not None]
    return min(found, key=lambda grid: grid.bits_per_weight, default=None)


def unfair_configurations(found: CoarseGrid | None, menu: Iterable[QuantSpec], *, axis: int = 1) -> list[QuantSpec]:
    """Configurations of the menu whose grid can contain the one found, and so rebuild the weights almost exactly.

    Those are the ones with groups along in_features (`axis` 1) of a size that divides the found size and with at
    least as many bits.
    """
    if found is None or axis != 1:
        return []
    in_groups = [spec for spec in menu if spec.group_size]
    return [spec for spec in in_groups if found.group_size % spec.group_size == 0 and spec.bits >= found.bits]


def coarse_grid_warnings(
    found: Mapping[ModuleId, CoarseGrid | None], menu: Sequence[QuantSpec], *, axis: int = 1
) -> list[str]:
    """A sentence for every kind of grid that makes configurations of the menu unfair, naming these; often none."""
    warnings = []
    for grid in sorted({grid for grid in found.values() if grid is not None}, key=lambda grid: grid.bits_per_weight):
        unfair = unfair_configurations(grid, menu, axis=axis)
        if unfair:
            count = sum(other == grid for other in found.values())
            warnings.append(
                f"{count} of {len(found)} matrices already lie on a grid of {grid.bits} bits in groups of "
                f"{grid.group_size}, as in a model opened from a quantized file: "
                f"{', '.join(spec.name for spec in unfair)} can rebuild them almost exactly, which says nothing about "
                "these configurations. Take them out of the menu, or start from the unquantized model."
            )
    return warnings


def _grid_in_groups(weight: Tensor, group_size: int) -> CoarseGrid | None:
    groups = weight.reshape(-1, group_size)
    # odd strides, so as not to look at the same columns of every row
    first, sample = (groups[:: len(groups) // wanted | 1] for wanted in (_FIRST_GROUPS, _SAMPLED_GROUPS))
    levels = _levels(sample) if _levels(first) is not None else None
    # one level everywhere: a matrix of zeros lies on every grid, which tells nothing of where it comes from
    return None if levels in (None, 1) else CoarseGrid(math.ceil(math.log2(levels)), group_size)


def _levels(groups: Tensor) -> int | None:
    """Equally spaced values that each of groups [groups, group_size] lies on at most; None if one does not."""
    storage = torch.finfo(_storage_dtype(groups))
    values = groups.to(torch.float64)
    rounding = 2 * storage.eps * values.abs().amax(1).clamp(min=storage.tiny)
    low = values.amin(1)
    spread = values.amax(1) - low
    offsets = (values - low[:, None]) / torch.where(spread > 0, spread, 1)[:, None]
    unplaced = spread > 0
    levels = 1
    tried = 0
    while unplaced.any() and tried < 2**MOST_BITS - 1:
        at_once = max(1, _ELEMENTS_AT_ONCE // (int(unplaced.sum()) * groups.shape[1]))
        steps = torch.arange(tried + 1, min(tried + at_once + 1, 2**MOST_BITS)).to(values)
        tried += len(steps)
        tolerance = (rounding[unplaced] * steps[:, None]) / spread[unplaced]  # [steps, groups]
        scaled = offsets[unplaced] * steps[:, None, None]
        distance = (scaled - scaled.round()).abs().amax(2)
        placed = (distance <= tolerance) & (tolerance <= _LARGEST_TOLERANCE)
        has_place = placed.any(0)
        if has_place.any():
            fewest_steps = steps[placed[:, has_place].int().argmax(0)]  # argmax: the first of those that place it
            levels = max(levels, int(fewest_steps.max()) + 1)
            unplaced[unplaced.nonzero().flatten()[has_place]] = False
    return None if unplaced.any() else levels


def _storage_dtype(values: Tensor) -> torch.dtype:
    """The narrowest type that holds all `values` exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return dtype
    return values.dtype
