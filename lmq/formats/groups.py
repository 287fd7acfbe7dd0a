"""The quantization grid of one weight matrix, as its checkpoint stores it.

A group of `group_size` weights shares a scale and a zero; code q stands for the weight `(q - zero) * scale`.
Both are stored in 8 bits:

- `scale_codes` uint8 [groups]: code 0 is a scale of exactly 0 (a group of zeros); code k from 1 to 255 is
  `low * (high / low) ** ((k - 1) / 254)`, with `low, high` of the code's range. The ladder is geometric so that
  one outlier group costs its neighbours a fixed relative precision, not their resolution.
- `scale_ranges` float16 [ceil(groups / meta_group_size), 2]: low and high of the scales of `meta_group_size`
  consecutive groups, in multiples of the scale unit.
- `zero_codes` uint8 [groups]: `zero_low + code * (zero_high - zero_low) / 255`.
- `matrix_range` float32 [3]: scale unit, zero_low, zero_high. Whole zeros are their own codes: 0 and 255.

With axis 1 the groups are the rows of `weight.reshape(-1, group_size)`: they run along in_features, and straddle
rows where group_size does not divide in_features, as in hqq. With axis 0 they are the columns of
`weight.reshape(group_size, -1)`. Any matrix whose element count is a multiple of group_size is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec

GRID_TENSORS = ("scale_codes", "zero_codes", "scale_ranges", "matrix_range")

_SCALE_STEPS = 254
_ZERO_STEPS = 255
_HIGHEST_RANGE = 2.0**15
_LOWEST_RANGE = 2.0**-14
"""Scale ranges are kept between the smallest normal float16 and half of its largest power of two."""

_CPU_BLOCK_ELEMENTS = 1 << 19
_GPU_BLOCK_ELEMENTS = 1 << 24


def to_groups(weight: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
    """Groups of a matrix as rows [groups, group_size]: a view for axis 1, a transposed view for axis 0."""
    return weight.reshape(-1, group_size) if axis == 1 else weight.reshape(group_size, -1).t()


def require_axis(axis: int) -> None:
    """Raise InputError for an axis that is neither 0 nor 1."""
    if axis not in (0, 1):
        raise InputError(f"axis = {axis} is not a grouping axis; allowed: 0, 1")


def from_groups(groups: torch.Tensor, shape: tuple[int, int], axis: int) -> torch.Tensor:
    """Inverse of `to_groups`: the matrix `[out_features, in_features]`."""
    return groups.reshape(shape) if axis == 1 else groups.t().reshape(shape)


def group_blocks(groups: torch.Tensor) -> Iterator[slice]:
    """Slices over groups [groups, group_size]: blocks that stay in a processor's cache, or fill a GPU."""
    block_elements = _CPU_BLOCK_ELEMENTS if groups.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    step = max(1, block_elements // groups.shape[1])
    return (slice(start, start + step) for start in range(0, len(groups), step))


def grid_tensor_shapes(spec: QuantSpec, parameters: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of the grid of a matrix of `parameters` weights."""
    groups = spec.groups(parameters)
    return {
        "scale_codes": ((groups,), torch.uint8),
        "zero_codes": ((groups,), torch.uint8),
        "scale_ranges": ((-(-groups // spec.meta_group_size), 2), torch.float16),
        "matrix_range": ((3,), torch.float32),
    }


@dataclass(frozen=True, eq=False)
class StoredLevels:
    """Every scale and zero that the groups of a grid can store while its ranges stay.

    `bottom` and `step` float32 [groups]: a scale of code k is `unit * exp(bottom + (k - 1) * step)`.
    """

    bottom: torch.Tensor
    step: torch.Tensor
    unit: torch.Tensor
    zero_low: torch.Tensor
    zero_step: torch.Tensor

    def at(self, number: int) -> StoredLevels:
        """Those of one group of every row, from [matrices, groups of a row, out_features]."""
        return replace(self, bottom=self.bottom[:, number], step=self.step[:, number])

    def scale_codes(self, scale: torch.Tensor) -> torch.Tensor:
        """Codes from 1 to 255 of the levels nearest to positive scales, as float32."""
        steps = ((scale / self.unit).log() - self.bottom) / self.step
        return steps.nan_to_num(nan=0.0).round().clamp(0, _SCALE_STEPS) + 1

    def scale(self, codes: torch.Tensor) -> torch.Tensor:
        """Scales of codes, float32; code 0 is a scale of 0."""
        return ((codes - 1) * self.step + self.bottom).exp_().mul_(self.unit).masked_fill_(codes == 0, 0)

    def zero_codes(self, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes of the levels nearest to zeros, as float32; the same beside any scale."""
        return ((zero - self.zero_low) / self.zero_step).nan_to_num(nan=0.0).round().clamp(0, _ZERO_STEPS)

    def zero(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Zeros of codes, float32; the same beside any scale."""
        return codes * self.zero_step + self.zero_low


@dataclass(frozen=True, eq=False)
class Grid:
    """Quantization grid of one matrix of `shape` [out_features, in_features]; see the module for each tensor."""

    spec: QuantSpec
    shape: tuple[int, int]
    axis: int
    scale_codes: torch.Tensor
    zero_codes: torch.Tensor
    scale_ranges: torch.Tensor
    matrix_range: torch.Tensor

    def __post_init__(self) -> None:
        require_axis(self.axis)
        for name, (shape, dtype) in grid_tensor_shapes(self.spec, self.shape[0] * self.shape[1]).items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise InputError(
                    f"{name} of a {self.spec} grid for {list(self.shape)} must be {dtype} {list(shape)}, "
                    f"not {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def size_bytes(self) -> int:
        """Bytes of the matrix on this grid, codes included, as stored."""
        return self.spec.size_bytes(self.shape[0] * self.shape[1])

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name: scale_codes, zero_codes, scale_ranges, matrix_range."""
        return {name: getattr(self, name) for name in GRID_TENSORS}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, shape: tuple[int, int], axis: int
    ) -> Grid:
        """Inverse of `to_tensors`. Raises InputError where a shape or dtype does not fit."""
        return cls(spec, shape, axis, **{name: tensors[name] for name in GRID_TENSORS})

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        return Grid.from_tensors(moved, self.spec, self.shape, self.axis)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every group, float32 [groups] each."""
        return decode_grid(
            self.scale_codes, self.zero_codes, self.scale_ranges, self.matrix_range, self.spec.meta_group_size
        )

    def levels(self) -> StoredLevels:
        """What else its groups could store."""
        ranges = self.scale_ranges.to(torch.float32).repeat_interleave(self.spec.meta_group_size, dim=0)
        low, high = ranges[: len(self.scale_codes)].unbind(1)
        unit, zero_low, zero_high = self.matrix_range.unbind()
        step = (high / low).log() / _SCALE_STEPS
        return StoredLevels(low.log(), step, unit, zero_low, (zero_high - zero_low) / _ZERO_STEPS)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest code of every weight, uint8 [groups, group_size]; `weight` [out_features, in_features]."""
        groups = to_groups(weight.detach().reshape(self.shape), self.spec.group_size, self.axis)
        scale, zero = self.decode()
        codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
        for block in group_blocks(groups):
            codes[block] = nearest_codes(groups[block], scale[block], zero[block], self.spec.bits)
        return codes

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights float32 [out_features, in_features] of codes uint8 [groups, group_size]."""
        scale, zero = self.decode()
        groups = codes.to(torch.float32).sub_(zero[:, None]).mul_(scale[:, None])
        return from_groups(groups, self.shape, self.axis)

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the checkpoint will have it, float32 [out_features, in_features].

        The same as `dequantize(codes(weight))` with less memory: no codes are kept.
        """
        groups = to_groups(weight.detach().reshape(self.shape), self.spec.group_size, self.axis)
        scale, zero = self.decode()
        rounded = torch.empty(self.shape, device=weight.device)
        rounded_groups = to_groups(rounded, self.spec.group_size, self.axis)
        for block in group_blocks(groups):
            codes = nearest_codes(groups[block], scale[block], zero[block], self.spec.bits)
            rounded_groups[block] = codes.sub_(zero[block, None]).mul_(scale[block, None])
        return rounded


def decode_grid(
    scale_codes: torch.Tensor,
    zero_codes: torch.Tensor,
    scale_ranges: torch.Tensor,
    matrix_range: torch.Tensor,
    meta_group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of every group, float32 [groups] each, from the stored tensors of a grid."""
    unit, zero_low, zero_high = matrix_range.unbind()
    scale = _decode_scales(scale_codes, scale_ranges, unit, meta_group_size)
    zero = zero_codes.to(torch.float32).mul_((zero_high - zero_low) / _ZERO_STEPS).add_(zero_low)
    return scale, zero


def nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest codes as float32 [groups, group_size]; a group whose scale is 0 gets the code nearest its zero."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = groups.to(torch.float32) * inverse[:, None]
    return codes.add_(zero[:, None]).round_().clamp_(0, 2**bits - 1)


def encode(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    spec: QuantSpec,
    axis: int,
    *,
    integer_zeros: bool = False,
) -> Grid:
    """Store the fitted scale and zero of every group (float32 [groups]) in 8 bits: the grid of `weight`.

    Groups whose fitted grid is out of reach of the shared 8-bit ranges, or much wider than their weights
    (constant groups), get the min-max grid instead. The zero is then refitted
    to the stored scale so that the middle of the grid stays where it was.

    With `integer_zeros` the zeros are whole numbers from 0 to 255 and are stored as they are, on grids that suit.
    """
    if not integer_zeros:
        scale, zero = reachable(to_groups(weight.detach(), spec.group_size, axis), scale, zero, spec.bits)
    return store_grid(scale, zero, spec, (weight.shape[0], weight.shape[1]), axis, integer_zeros=integer_zeros)


def store_grid(
    scale: torch.Tensor,
    zero: torch.Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    axis: int,
    *,
    integer_zeros: bool = False,
) -> Grid:
    """The second half of `encode`: the grid of a matrix of `shape` from scales and zeros that are `reachable`."""
    scale_codes, scale_ranges, unit = _encode_scales(scale, spec.meta_group_size)
    if integer_zeros:
        zero_codes, zero_range = zero.to(torch.uint8), zero.new_tensor([0, _ZERO_STEPS])
    else:
        stored = _decode_scales(scale_codes, scale_ranges, unit, spec.meta_group_size)
        middle = (2**spec.bits - 1) / 2
        refitted = torch.where(stored > 0, middle - (middle - zero) * scale / stored, middle)
        zero_codes, zero_range = _encode_zeros(refitted, stored > 0)
    matrix_range = torch.cat([unit.reshape(1), zero_range])
    return Grid(spec, shape, axis, scale_codes, zero_codes, scale_ranges, matrix_range)


def reachable(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `encode`, which may be taken some groups [groups, group_size] at a time.

    The fitted scale and zero, replaced where zero is more than a grid's width off its grid or scale is wasteful.

    The replacement is the smallest grid with zero in [-top, 2 top] that covers the group; a group of zeros gets
    scale 0.
    """
    low, high = (extreme.to(torch.float32) for extreme in (groups.amin(1), groups.amax(1)))
    top = 2**bits - 1
    covering = torch.stack([(high - low) / top, high / (2 * top), -low / (2 * top)]).amax(0)
    covering_zero = torch.where(low + high > 0, top - high / covering, -low / covering)
    wasteful = scale * top > 2 * (high - low)
    keep = (zero >= -top) & (zero <= 2 * top) & ~wasteful
    scale = torch.where(keep, scale, covering)
    return scale, torch.where(keep, zero, torch.where(covering > 0, covering_zero, 0))


def _encode_scales(scale: torch.Tensor, meta_group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [groups], ranges float16 [ranges, 2] rounded outward, and the unit float32 []."""
    unit = scale.amax() / _HIGHEST_RANGE
    in_units = torch.where(scale > 0, (scale / unit).clamp(min=_LOWEST_RANGE), 0)
    padded = torch.nn.functional.pad(in_units, (0, -scale.numel() % meta_group_size)).view(-1, meta_group_size)
    low = torch.where(padded > 0, padded, torch.inf).amin(1).clamp(max=_HIGHEST_RANGE)
    high = padded.amax(1).clamp(min=_LOWEST_RANGE)
    ranges = torch.stack([_float16_below(low), _float16_above(high)], dim=1)
    ladder = ranges.to(torch.float32).log()
    bottom, span = (
        part.repeat_interleave(meta_group_size)[: scale.numel()] for part in (ladder[:, 0], ladder[:, 1] - ladder[:, 0])
    )
    steps = (in_units.log() - bottom) * _SCALE_STEPS / span
    codes = steps.nan_to_num(nan=0.0).round().clamp(0, _SCALE_STEPS) + 1
    return torch.where(in_units > 0, codes, 0).to(torch.uint8), ranges, unit


def _decode_scales(codes: torch.Tensor, ranges: torch.Tensor, unit: torch.Tensor, meta_group_size: int) -> torch.Tensor:
    low, high = ranges.to(torch.float32).unbind(1)
    bottom, step = low.log()[:, None], ((high / low).log() / _SCALE_STEPS)[:, None]
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % meta_group_size)).view(-1, meta_group_size)
    steps = padded.to(torch.float32).sub_(1)
    scales = steps.mul_(step).add_(bottom).exp_().mul_(unit).masked_fill_(padded == 0, 0)
    return scales.view(-1)[: codes.numel()]


def _encode_zeros(zero: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [groups] and the range float32 [2] of the zeros of the groups in use."""
    low = torch.where(used, zero, torch.inf).amin()
    high = torch.where(used, zero, -torch.inf).amax()
    zero_range = torch.stack([low, high]).nan_to_num(posinf=0.0, neginf=0.0)
    step = (zero_range[1] - zero_range[0]) / _ZERO_STEPS
    codes = torch.where(step > 0, (zero - zero_range[0]) / step, 0).round().clamp(0, _ZERO_STEPS)
    return torch.where(used, codes, 0).to(torch.uint8), zero_range


def _float16_below(values: torch.Tensor) -> torch.Tensor:
    rounded = values.to(torch.float16)
    return torch.where(rounded.to(torch.float32) > values, torch.nextafter(rounded, rounded.new_zeros(())), rounded)


def _float16_above(values: torch.Tensor) -> torch.Tensor:
    rounded = values.to(torch.float16)
    above = torch.nextafter(rounded, rounded.new_full((), torch.inf))
    return torch.where(rounded.to(torch.float32) < values, above, rounded)
