"""Types of weights that engines compute with, most of them llama.cpp's: their sizes, bytes, and what these stand for.

A row is made of blocks of `block_size` weights, and a block of groups of `group_size`. A weight is

    scale · level − minimum,    scale = d · s,    minimum = e · m,

with float16 d and e per block and, in blocks of 256, a small integer s and m per group. `level` is the code's entry in
`levels`. Types without minima leave out e and m. Q4_1 and Q5_1 store −e.

| type | bits per weight | group | levels | s | m |
|---|---:|---:|---|---|---|
| q4_0, q5_0, q8_0 | 4.5, 5.5, 8.5 | 32 | −8..7, −16..15, −128..127 | | |
| q4_1, q5_1 | 5, 6 | 32 | 0..15, 0..31 | | |
| iq4_nl, iq4_xs | 4.5, 4.25 | 32 | 16 of unequal steps | iq4_xs: −32..31 | |
| q2_k | 2.625 | 16 | 0..3 | 0..15 | 0..15 |
| q3_k | 3.4375 | 16 | −4..3 | −32..31 | |
| q4_k, q5_k | 4.5, 5.5 | 32 | 0..15, 0..31 | 0..63 | 0..63 |
| q6_k | 6.5625 | 16 | −32..31 | −128..127 | |
| mxfp4, nvfp4 | 4.25, 4.5 | 32, 16 | E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives | | |
| fp8 | 8 | a row | the 253 finite values of E4M3, up to 448 | | |

d of mxfp4 is a power of two, the byte E8M0. That of nvfp4 has 3 bits behind its leading one (E5M3: 5 bits of exponent).
NVFP4 is E4M3 times a float32 of the matrix. With a power of two for the latter, E5M3 holds the product, and a block
stands for itself; `lmq.formats.float4` takes both apart again. GGUF files hold nvfp4 in another layout. fp8 is not in
them at all: a row is one block, whose d has 3 bits behind its leading one too.

Layouts, and the types of rows that are no multiple of 256, are those of llama.cpp (ggml-common.h and
`tensor_type_fallback` in llama-quant.cpp, as of llama-cpp-python 0.3.36). The tests read them with the gguf package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lmq.errors import InputError

SMALL_BLOCK, LARGE_BLOCK = 32, 256
BLOCKS_TENSOR = "blocks"
"""Name of the one stored tensor of a matrix in a type of GGUF."""

_UNEQUAL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_SIZES = tuple((number % 8 + 8 * (number >= 8)) * 2.0 ** (max(number // 8, 1) - 10) for number in range(127))
_CPU_BLOCK_ELEMENTS = 1 << 20
_LARGEST_FLOAT16, _SMALLEST_FLOAT16 = 65504.0, 2.0**-24


class _Field(NamedTuple):
    """`width` bits of every code: a byte holds those of 8 / width codes that are `run` apart."""

    width: int
    run: int


class ByteFloat(NamedTuple):
    """Positive floats of one byte: `mantissa` bits, and above them float32's exponent less `least`.

    Bytes 0 and 255 are read, but not written. Those of a matrix are at most a factor of `span` apart.
    """

    mantissa: int
    least: int
    span: float = float("inf")

    def byte(self, values: Tensor) -> Tensor:
        """The bytes, int32, of the values nearest to float32 values that are not negative."""
        shift = 23 - self.mantissa
        nearest = (values.contiguous().view(torch.int32) + (1 << shift - 1)) >> shift
        return (nearest - (self.least << self.mantissa)).clamp(1, 254)

    def value(self, stored: Tensor) -> Tensor:
        """What bytes of any integer type stand for, float32; 0 of E8M0 is 2^-127."""
        bits = (stored.to(torch.int32) + (self.least << self.mantissa)) << 23 - self.mantissa
        return bits.clamp_min(1 << 22).view(torch.float32)


E8M0 = ByteFloat(mantissa=0, least=0)
E5M3 = ByteFloat(mantissa=3, least=127 - 24, span=2.0**13)
"""Up to 224 as written, so that weights reach 1,344. E4M3 times a power of two holds the span wherever it lies."""
E5M3_OF_ROWS = ByteFloat(mantissa=3, least=127 - 21)
"""From 2^-21 on, so that float16 and bfloat16 hold every value as it is."""


@dataclass(frozen=True)
class GgufType:
    """One type. `number` is that of GGUF files, or above 999; `order` says which parts a block is made of, in turn.

    `scales` and `minima` are the smallest and largest of the integers that a group stores, None where it stores none.
    `low` are the lowest bits of codes, `high` those above; `stored_codes` what is stored for each code, if not itself.
    `narrow` is the type of rows that are no multiple of 256. `unit` is what d is stored as, float16 unless given.
    `group_size` and `block_size` are 0 where both are the row, whatever its length, until `of_rows` tells it.
    """

    name: str
    number: int
    bits: int
    group_size: int
    block_size: int
    levels: tuple[float, ...]
    order: tuple[str, ...]
    low: _Field
    high: _Field | None = None
    scales: tuple[int, int] | None = None
    minima: tuple[int, int] | None = None
    narrow: str | None = None
    unit: ByteFloat | None = None
    stored_codes: tuple[int, ...] | None = None

    @property
    def has_minimum(self) -> bool:
        """Whether its groups have a minimum."""
        return "e" in self.order

    @property
    def is_even(self) -> bool:
        """Whether its levels are whole numbers that follow each other."""
        return len(self.levels) == self.levels[-1] - self.levels[0] + 1

    @property
    def is_twos_complement(self) -> bool:
        """Whether what is stored is the level itself, a byte with a sign."""
        return self.is_even and self.low.width == 8

    @property
    def groups_per_block(self) -> int:
        """Groups of a block."""
        return self.block_size // self.group_size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.part_bytes(part) for part in self.order)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; without the scale where a block is a row."""
        return 8 * self.block_bytes / self.block_size if self.block_size else float(self.bits)

    @property
    def row_multiple(self) -> int:
        """What the weights of a row are a multiple of, in this type or the one that stands in for it."""
        return min(self.block_size, SMALL_BLOCK) or 1

    def of_rows(self, in_features: int) -> GgufType:
        """The type that rows of `in_features` weights take: this one, or that of llama.cpp for rows it does not fit.

        Its blocks have a size. Raises InputError for rows that are no multiple of `row_multiple`.
        """
        if not self.block_size:
            return replace(self, group_size=in_features, block_size=in_features)
        if in_features % self.row_multiple:
            raise InputError(
                f"{self.name} does not fit rows of {in_features:,} weights: it takes rows that are a multiple of "
                f"{self.row_multiple}; keep the matrix unquantized"
            )
        if in_features % self.block_size == 0:
            return self
        return GGUF_TYPES[str(self.narrow)]

    def size_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix, in the type of its rows. Raises InputError as `of_rows` does."""
        taken = self.of_rows(in_features)
        return out_features * (in_features // taken.block_size) * taken.block_bytes

    def part_bytes(self, part: str) -> int:
        """Bytes that a part of `order` takes of a block."""
        fields = {"low": self.low, "high": self.high}
        if part in fields:
            field = fields[part]
            assert field is not None
            return self.block_size * field.width // 8
        if part == "d" and self.unit is not None:
            return 1
        return 2 if part in ("d", "e") else _SCALE_BYTES[self.name]

    def nearest_unit(self, values: Tensor) -> Tensor:
        """The nearest values that d can have, float32; those of a byte are positive, whatever the sign."""
        if self.unit is None:
            return as_float16(values)
        return self.unit.value(self.unit.byte(values.abs()))


_SCALE_BYTES = {"q2_k": 16, "q3_k": 12, "q4_k": 12, "q5_k": 12, "q6_k": 16, "iq4_xs": 6}


def _small(name: str, number: int, bits: int, levels: Sequence[int], order: str) -> GgufType:
    low, high = (_Field(8, 1), None) if bits == 8 else (_Field(4, 16), _Field(1, 1) if bits == 5 else None)
    return GgufType(name, number, bits, 32, SMALL_BLOCK, tuple(levels), tuple(order.split()), low, high)


def _floats(name: str, number: int, size: int, sizes: Sequence[float], low: _Field, unit: ByteFloat) -> GgufType:
    """A type whose codes are the numbers of `sizes`, their highest bit set for the negative ones. -0 is read as 0."""
    negative = range(len(sizes) - 1, 0, -1)
    levels = (*(-sizes[code] for code in negative), *sizes)
    codes = (*(code | 1 << low.width - 1 for code in negative), *range(len(sizes)))
    return GgufType(name, number, low.width, size, size, levels, ("d", "low"), low, unit=unit, stored_codes=codes)


GGUF_TYPES: Mapping[str, GgufType] = {
    each.name: each
    for each in (
        _small("q4_0", 2, 4, range(-8, 8), "d low"),
        _small("q4_1", 3, 4, range(16), "d e low"),
        _small("q5_0", 6, 5, range(-16, 16), "d high low"),
        _small("q5_1", 7, 5, range(32), "d e high low"),
        _small("q8_0", 8, 8, range(-128, 128), "d low"),
        _small("iq4_nl", 20, 4, _UNEQUAL_LEVELS, "d low"),
        GgufType(
            name="q2_k",
            number=10,
            bits=2,
            group_size=16,
            block_size=LARGE_BLOCK,
            levels=tuple(range(4)),
            order=("scales", "low", "d", "e"),
            low=_Field(2, 32),
            scales=(0, 15),
            minima=(0, 15),
            narrow="q4_0",
        ),
        GgufType(
            name="q3_k",
            number=11,
            bits=3,
            group_size=16,
            block_size=LARGE_BLOCK,
            levels=tuple(range(-4, 4)),
            order=("high", "low", "scales", "d"),
            low=_Field(2, 32),
            high=_Field(1, 32),
            scales=(-32, 31),
            narrow="q4_0",
        ),
        GgufType(
            name="iq4_xs",
            number=23,
            bits=4,
            group_size=32,
            block_size=LARGE_BLOCK,
            levels=_UNEQUAL_LEVELS,
            order=("d", "scales", "low"),
            low=_Field(4, 16),
            scales=(-32, 31),
            narrow="iq4_nl",
        ),
        GgufType(
            name="q4_k",
            number=12,
            bits=4,
            group_size=32,
            block_size=LARGE_BLOCK,
            levels=tuple(range(16)),
            order=("d", "e", "scales", "low"),
            low=_Field(4, 32),
            scales=(0, 63),
            minima=(0, 63),
            narrow="q5_0",
        ),
        GgufType(
            name="q5_k",
            number=13,
            bits=5,
            group_size=32,
            block_size=LARGE_BLOCK,
            levels=tuple(range(32)),
            order=("d", "e", "scales", "high", "low"),
            low=_Field(4, 32),
            high=_Field(1, 32),
            scales=(0, 63),
            minima=(0, 63),
            narrow="q5_1",
        ),
        GgufType(
            name="q6_k",
            number=14,
            bits=6,
            group_size=16,
            block_size=LARGE_BLOCK,
            levels=tuple(range(-32, 32)),
            order=("low", "high", "scales", "d"),
            low=_Field(4, 64),
            high=_Field(2, 32),
            scales=(-128, 127),
            narrow="q8_0",
        ),
        _floats("mxfp4", 39, 32, _E2M1_SIZES, _Field(4, 16), E8M0),
        _floats("nvfp4", 40, 16, _E2M1_SIZES, _Field(4, 8), E5M3),
        _floats("fp8", 1000, 0, _E4M3_SIZES, _Field(8, 1), E5M3_OF_ROWS),
    )
}

LLAMA_CPP_TYPES = tuple(name for name in GGUF_TYPES if name not in ("nvfp4", "fp8"))
"""Names of those whose bytes are written to GGUF files as they are."""


@dataclass(frozen=True, eq=False)
class GgufGrid:
    """The grid of one matrix of `shape` [out_features, in_features], as `kind` stores it.

    `unit` is d and `minimum_unit` e, float32 [blocks] of values that are stored exactly; `scales` and `minima` s and m,
    int16 [blocks, groups of a block], ones for types that store none. Without minima both are None.
    """

    kind: GgufType
    shape: tuple[int, int]
    unit: Tensor
    scales: Tensor
    minimum_unit: Tensor | None = None
    minima: Tensor | None = None

    def scale(self) -> Tensor:
        """d · s of every group, float32 [groups]; it may be negative."""
        return (self.unit[:, None] * self.scales).view(-1)

    def minimum(self) -> Tensor | None:
        """e · m of every group, float32 [groups]."""
        if self.minimum_unit is None or self.minima is None:
            return None
        return (self.minimum_unit[:, None] * self.minima).view(-1)

    def decode(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group, float32 [groups]: a weight is (step − zero) · scale.

        The step is the code where levels are even, and the level where they are not.
        """
        scale, minimum = self.scale(), self.minimum()
        lowest = float(-self.kind.levels[0]) if self.kind.is_even else 0.0
        if minimum is None:
            return scale, torch.full_like(scale, lowest)
        return scale, torch.where(scale != 0, minimum / scale, 0)

    def weights(self, codes: Tensor) -> Tensor:
        """Weights float32 [out_features, in_features] of codes uint8 in the same order."""
        scale, minimum = self.scale(), self.minimum()
        levels = levels_of(codes.reshape(-1, self.kind.group_size), self.kind).mul_(scale[:, None])
        return (levels if minimum is None else levels.sub_(minimum[:, None])).view(self.shape)


@dataclass(frozen=True, eq=False)
class GgufLevels:
    """Every scale and zero that the groups of a grid can store while d and e stay.

    `unit` and `minimum_unit` float32 are d and e of every group, in any shape that scales and zeros come in. A code is
    s or m; of types whose groups have d and e of their own it is the value of these.
    """

    kind: GgufType
    unit: Tensor
    minimum_unit: Tensor | None

    def at(self, number: int) -> GgufLevels:
        """Those of one group of every row, from [matrices, groups of a row, out_features]."""
        return GgufLevels(
            self.kind, self.unit[:, number], None if self.minimum_unit is None else self.minimum_unit[:, number]
        )

    def scale_codes(self, scale: Tensor) -> Tensor:
        """Codes of the levels nearest to scales."""
        if self.kind.scales is None:
            return self.kind.nearest_unit(scale)
        low, high = self.kind.scales
        # a scale of 0 holds no more than the smallest one where there is a minimum
        return (scale / self.unit).nan_to_num(nan=0.0).round().clamp(1 if self.kind.has_minimum else low, high)

    def scale(self, codes: Tensor) -> Tensor:
        """Scales of codes."""
        return codes.clone() if self.kind.scales is None else codes * self.unit

    def zero_codes(self, zero: Tensor, scale: Tensor) -> Tensor:
        """Codes of the levels nearest to zeros beside scales that are not 0."""
        if self.kind.minima is None:
            return as_float16(zero * scale)
        assert self.minimum_unit is not None
        low, high = self.kind.minima
        return (zero * scale / self.minimum_unit).nan_to_num(nan=0.0).round().clamp(low, high)

    def zero(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Zeros of codes beside scales; 0 where the scale is 0. Without minima codes are the zeros."""
        if not self.kind.has_minimum:
            return codes
        minimum = codes if self.kind.minima is None or self.minimum_unit is None else codes * self.minimum_unit
        return torch.where(scale != 0, minimum / scale, 0)


def as_float16(values: Tensor) -> Tensor:
    """The nearest float16 values other than infinity and 0, as float32; 0 stays 0."""
    rounded = values.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).to(torch.float16).to(torch.float32)
    return torch.where((rounded == 0) & (values != 0), values.sign() * _SMALLEST_FLOAT16, rounded)


def levels_of(codes: Tensor, kind: GgufType) -> Tensor:
    """Levels of codes uint8, float32 in their shape."""
    if kind.is_even:
        return codes.to(torch.float32).add_(kind.levels[0])
    return torch.tensor(kind.levels, dtype=torch.float32, device=codes.device)[codes.int()]


def pack_blocks(grid: GgufGrid, codes: Tensor) -> Tensor:
    """The bytes of a matrix, uint8 [out_features, bytes per row], from its grid and codes uint8 of its shape."""
    kind = grid.kind
    flat = codes.reshape(-1, kind.block_size)
    if kind.stored_codes is not None:
        flat = flat.new_tensor(kind.stored_codes)[flat.int()]
    parts = []
    for part in kind.order:
        if part == "d":
            unit = grid.unit
            parts.append(_float16_bytes(unit) if kind.unit is None else kind.unit.byte(unit).to(torch.uint8)[:, None])
        elif part == "e":
            assert grid.minimum_unit is not None
            parts.append(_float16_bytes(-grid.minimum_unit if kind.minima is None else grid.minimum_unit))
        elif part == "scales":
            parts.append(_pack_scales(kind.name, grid.scales, grid.minima))
        elif part == "low":
            low = _join(flat & 2**kind.low.width - 1, kind.low)
            parts.append(low ^ 128 if kind.is_twos_complement else low)
        else:
            assert kind.high is not None
            parts.append(_join(flat >> kind.low.width, kind.high))
    return torch.cat(parts, dim=1).view(grid.shape[0], -1)


def unpack_blocks(stored: Tensor, kind: GgufType, shape: tuple[int, int]) -> tuple[GgufGrid, Tensor]:
    """Inverse of `pack_blocks`: grid and codes uint8 of `shape`. Raises InputError where the bytes do not fit it."""
    _check_blocks(stored, kind, shape)
    blocks = stored.reshape(-1, kind.block_bytes)
    sizes = [kind.part_bytes(part) for part in kind.order]
    parts = dict(zip(kind.order, blocks.split(sizes, dim=1), strict=True))
    unit = _float16_values(parts["d"]) if kind.unit is None else kind.unit.value(parts["d"][:, 0])
    grid = GgufGrid(kind, shape, unit, unit.new_ones(len(unit), kind.groups_per_block, dtype=torch.int16))
    if "scales" in parts:
        scales, minima = _unpack_scales(kind.name, parts["scales"])
        grid = replace(grid, scales=scales, minima=minima)
    if kind.has_minimum:
        minimum_unit = _float16_values(parts["e"])
        minima = torch.ones_like(grid.scales) if kind.minima is None else grid.minima
        grid = replace(grid, minimum_unit=-minimum_unit if kind.minima is None else minimum_unit, minima=minima)
    codes = _split(parts["low"] ^ 128 if kind.is_twos_complement else parts["low"], kind.low)
    if kind.high is not None:
        codes |= _split(parts["high"], kind.high) << kind.low.width
    if kind.stored_codes is not None:
        code_of = codes.new_full((1 << kind.bits,), kind.levels.index(0))
        code_of[list(kind.stored_codes)] = torch.arange(len(kind.levels), dtype=torch.uint8, device=codes.device)
        codes = code_of[codes.int()]
    return grid, codes.view(shape)


def _check_blocks(stored: Tensor, kind: GgufType, shape: tuple[int, int]) -> None:
    expected = (shape[0], shape[1] // kind.block_size * kind.block_bytes)
    if shape[1] % kind.block_size or tuple(stored.shape) != expected or stored.dtype != torch.uint8:
        raise InputError(
            f"blocks of a {kind.name} matrix {list(shape)} must be torch.uint8 {list(expected)}, "
            f"not {stored.dtype} {list(stored.shape)}"
        )


def decode_blocks(stored: Tensor, kind: GgufType, shape: tuple[int, int]) -> Tensor:
    """Weights float32 [out_features, in_features] of a matrix's bytes. Raises as `unpack_blocks` does."""
    step = max(1, _CPU_BLOCK_ELEMENTS // shape[1]) if stored.device.type == "cpu" else shape[0]
    weight = torch.empty(shape, device=stored.device)
    _check_blocks(stored, kind, shape)
    for start in range(0, shape[0], step):
        rows = stored[start : start + step]
        grid, codes = unpack_blocks(rows, kind, (len(rows), shape[1]))
        weight[start : start + step] = grid.weights(codes)
    return weight


@dataclass(frozen=True, eq=False)
class GgufMatrix:
    """A matrix of `shape` [out_features, in_features] in a type: `blocks` uint8 [out_features, bytes per row].

    It stands where a grid with codes does: the weight that `round_trip` is given is not looked at.
    """

    kind: GgufType
    shape: tuple[int, int]
    blocks: Tensor

    def __post_init__(self) -> None:
        _check_blocks(self.blocks, self.kind, self.shape)

    @classmethod
    def of(cls, grid: GgufGrid, codes: Tensor) -> GgufMatrix:
        """A grid with codes uint8 of its shape."""
        return cls(grid.kind, grid.shape, pack_blocks(grid, codes))

    @property
    def size_bytes(self) -> int:
        """Bytes as stored."""
        return self.blocks.numel()

    def to(self, device: torch.device | str) -> GgufMatrix:
        """The same on another device."""
        return replace(self, blocks=self.blocks.to(device))

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Weights float32 [rows, in_features], of all rows unless some are asked for."""
        blocks = self.blocks[rows]
        return decode_blocks(blocks, self.kind, (len(blocks), self.shape[1]))

    def round_trip(self, weight: Tensor) -> Tensor:
        """The weight as it is stored, float32 [out_features, in_features]."""
        return self.dequantize().to(weight.device)


def _join(fields: Tensor, field: _Field) -> Tensor:
    """Bytes uint8 [blocks, bytes] of fields uint8 [blocks, weights] below 2^width."""
    per_byte = 8 // field.width
    spread = fields.reshape(len(fields), -1, per_byte, field.run)
    joined = spread[:, :, 0].clone()
    for place in range(1, per_byte):
        joined |= spread[:, :, place] << field.width * place
    return joined.reshape(len(fields), -1)


def _split(stored: Tensor, field: _Field) -> Tensor:
    """Inverse of `_join`."""
    spread = stored.reshape(len(stored), -1, 1, field.run)
    places = [spread >> field.width * place for place in range(8 // field.width)]
    return (torch.cat(places, dim=2) & 2**field.width - 1).view(len(stored), -1)


def _float16_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16)[:, None].contiguous().view(torch.uint8)


def _float16_values(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16)[:, 0].to(torch.float32)


_LOW_OF_Q3, _HIGH_OF_Q3 = _Field(4, 8), _Field(2, 4)
_LOW_OF_XS, _HIGH_OF_XS = _Field(4, 1), _Field(2, 1)


def _pack_scales(name: str, scales: Tensor, minima: Tensor | None) -> Tensor:
    """The bytes of a block's integers."""
    if name == "q6_k":
        return scales.to(torch.int8).view(torch.uint8)
    if minima is None:
        stored = (scales + 32).to(torch.uint8)
        if name == "q3_k":
            return torch.cat([_join(stored & 15, _LOW_OF_Q3), _join(stored >> 4, _HIGH_OF_Q3)], dim=1)
        return torch.cat([_join(stored >> 4, _HIGH_OF_XS), _join(stored & 15, _LOW_OF_XS)], dim=1)
    first, second = scales.to(torch.uint8), minima.to(torch.uint8)
    if name == "q2_k":
        return first | second << 4
    return torch.cat(
        [
            first[:, :4] | first[:, 4:] >> 4 << 6,
            second[:, :4] | second[:, 4:] >> 4 << 6,
            first[:, 4:] & 15 | (second[:, 4:] & 15) << 4,
        ],
        dim=1,
    )


def _unpack_scales(name: str, stored: Tensor) -> tuple[Tensor, Tensor | None]:
    """Inverse of `_pack_scales`, int16 each."""
    if name == "q6_k":
        return stored.contiguous().view(torch.int8).to(torch.int16), None
    if name == "q3_k":
        joined = _split(stored[:, :8], _LOW_OF_Q3) | _split(stored[:, 8:], _HIGH_OF_Q3) << 4
        return joined.to(torch.int16) - 32, None
    if name == "iq4_xs":
        joined = _split(stored[:, 2:], _LOW_OF_XS) | _split(stored[:, :2], _HIGH_OF_XS) << 4
        return joined.to(torch.int16) - 32, None
    if name == "q2_k":
        return (stored & 15).to(torch.int16), (stored >> 4).to(torch.int16)
    first, second, third = stored.split(4, dim=1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return scales.to(torch.int16), minima.to(torch.int16)
