"""Quantization configurations: how many bits, in groups of what size, and what that takes in bytes.

Bits per weight follow MXQ equation 2, `b1 + 2·b2/g1 + 32/(g1·g2)`: an 8-bit scale and zero for every
group of weights, and a 16-bit range (low, high) for every group of scales. The bytes of a stored matrix
are that formula with the last partial groups rounded up, plus `MATRIX_HEADER_BYTES`.

The types that llama.cpp computes with are configurations too, by their names: `q4_k` (`lmq.formats.gguf_types`). So
are `mxfp4`, `nvfp4` and `fp8`, which vLLM serves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lmq.errors import InputError
from lmq.formats.gguf_types import GGUF_TYPES, GgufType

ALLOWED_BITS = (2, 3, 4, 5, 6, 8)
ALLOWED_GROUP_SIZES = (16, 32, 64, 128, 256)
MATRIX_HEADER_BYTES = 12
"""float32 unit of the scale ranges, float32 low and high of the zeros: one triple per matrix."""
GGUF_META_BITS = 16
"""`meta_bits` of a type of GGUF, whose outermost scales are float16; its number is in the place of meta_group_size."""

_GGUF_BY_NUMBER = {kind.number: kind for kind in GGUF_TYPES.values()}


@dataclass(frozen=True, order=True)
class QuantSpec:
    """One quantization configuration of a weight matrix, written `b3g64`, or the name of a type, as in `q4_k`.

    `bits` per weight code, `group_size` weights share one scale and zero, which are stored with
    `meta_bits` bits each; `meta_group_size` scales share one 16-bit range. A type has `GGUF_META_BITS`, and its number
    for the last. The group size of `fp8` is 0: a row of any length.
    """

    bits: int
    group_size: int
    meta_bits: int = 8
    meta_group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in ALLOWED_BITS:
            raise InputError(f"bits = {self.bits} is not a weight width; allowed: {ALLOWED_BITS}")
        if self.meta_bits == GGUF_META_BITS:
            kind = _GGUF_BY_NUMBER.get(self.meta_group_size)
            if kind is None or (kind.bits, kind.group_size) != (self.bits, self.group_size):
                raise InputError(
                    f"no type has the number {self.meta_group_size}, {self.bits} bits and groups of "
                    f"{self.group_size}; there are {', '.join(f'{k.name} ({k.number})' for k in GGUF_TYPES.values())}"
                )
        elif self.group_size not in ALLOWED_GROUP_SIZES:
            raise InputError(f"group_size = {self.group_size} is not allowed; allowed: {ALLOWED_GROUP_SIZES}")
        elif self.meta_bits != 8:
            raise InputError(f"meta_bits = {self.meta_bits} is not allowed; scales and zeros take 8 bits")
        if self.meta_group_size < 1:
            raise InputError(f"meta_group_size = {self.meta_group_size} is not allowed; it must be positive")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read `b3g64` or `q4_k`. Raises InputError for anything else."""
        kind = GGUF_TYPES.get(text.strip().lower())
        if kind is not None:
            return cls(kind.bits, kind.group_size, GGUF_META_BITS, kind.number)
        match = re.fullmatch(r"b(\d+)g(\d+)", text.strip())
        if match is None:
            raise InputError(
                f"{text!r} is not a configuration; write bits and group size as in 'b4g64', or a type: "
                f"{', '.join(GGUF_TYPES)}"
            )
        return cls(bits=int(match[1]), group_size=int(match[2]))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> QuantSpec:
        """Read the columns of a table: bits, group_size and, where it has them, meta_bits and meta_group_size."""
        fields = ("bits", "group_size", "meta_bits", "meta_group_size")
        return cls(**{name: int(row[name]) for name in fields if row.get(name) not in (None, "")})

    @property
    def gguf(self) -> GgufType | None:
        """The type of GGUF that this is; rows that are no multiple of 256 may take another (`GgufType.of_rows`)."""
        return _GGUF_BY_NUMBER[self.meta_group_size] if self.meta_bits == GGUF_META_BITS else None

    @property
    def name(self) -> str:
        """`b3g64`, `q4_k`."""
        return self.gguf.name if self.gguf else f"b{self.bits}g{self.group_size}"

    def __str__(self) -> str:
        return self.name

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight by MXQ equation 2, without the header of the matrix; those of a type's own blocks."""
        if self.gguf is not None:
            return self.gguf.bits_per_weight
        b1, g1, b2, g2 = self.bits, self.group_size, self.meta_bits, self.meta_group_size
        return float(b1 + Fraction(2 * b2, g1) + Fraction(32, g1 * g2))

    def groups(self, parameters: int) -> int:
        """Number of weight groups in a matrix of `parameters` weights. Raises InputError if it does not divide."""
        if parameters % self.group_size:
            raise InputError(
                f"{self.name} does not fit a matrix of {parameters:,} weights: "
                f"not a multiple of the group size {self.group_size}; take it out of the menu"
            )
        return parameters // self.group_size

    def size_bytes(self, parameters: int, in_features: int | None = None) -> int:
        """Bytes of a stored matrix of `parameters` weights in rows of `in_features`, as the checkpoint holds it.

        Rows count for types of GGUF alone. Raises InputError where it does not fit the matrix.
        """
        if self.gguf is not None:
            if in_features is None:
                raise InputError(f"{self.name} takes as many bytes as its rows need; give in_features")
            return self.gguf.size_bytes(parameters // in_features, in_features)
        groups = self.groups(parameters)
        scale_ranges = -(-groups // self.meta_group_size)
        codes_bytes = parameters * self.bits // 8
        return codes_bytes + 2 * groups + 4 * scale_ranges + MATRIX_HEADER_BYTES


STOPS: tuple[QuantSpec, ...] = tuple(QuantSpec(bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32))
"""The 12 standard configurations by size: b2g128, b2g64, b2g32, b3g128, ..., b8g32."""
