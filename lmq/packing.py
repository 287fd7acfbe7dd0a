"""Dense packing of weight codes: `elements · bits / 8` bytes exactly, in planes that unpack with shifts and masks.

A plane holds one field of `width` bits of every code, 8 / width codes to a byte. The codes, flattened in order and
counted n, are cut into 8 / width equal runs; byte i holds element i of every run, the first run in the lowest bits:

    width 4, n / 2 bytes: byte i = c[i] | c[i + n/2] << 4
    width 2, n / 4 bytes: byte i = c[i] | c[i + n/4] << 2 | c[i + 2n/4] << 4 | c[i + 3n/4] << 6
    width 1, n / 8 bytes: byte i = c[i] | c[i + n/8] << 1 | ... | c[i + 7n/8] << 7

Codes of 8, 4 and 2 bits are one plane (8 bits: the codes themselves). Codes of 3 bits are two planes, one after the
other: the low two bits of every code (n / 4 bytes), then the high bit (n / 8 bytes).
"""

from __future__ import annotations

import torch

from lmq.errors import InputError

_PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes of each code width, lowest bits first."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes of any shape into uint8 [elements · bits / 8].

    Raises InputError for a width other than 2, 3, 4, 8, for codes that are not uint8 or exceed 2^bits - 1, and for
    a number of codes that is not a multiple of 8.
    """
    widths = _plane_widths(bits)
    if codes.dtype != torch.uint8 or codes.numel() % 8:
        raise InputError(
            f"codes to pack must be torch.uint8 and a multiple of 8 in number, not {codes.numel():,} of {codes.dtype}"
        )
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise InputError(f"code {int(codes.max())} does not fit {bits} bits; allowed: 0 to {2**bits - 1}")
    planes, shift = [], 0
    for width in widths:
        runs = ((codes.reshape(-1) >> shift) & (2**width - 1)).view(8 // width, -1)
        planes.append(_pack_plane(runs, width))
        shift += width
    return torch.cat(planes)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 [elements], in the flattened order of the packed codes."""
    widths = _plane_widths(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() % bits:
        raise InputError(
            f"packed {bits}-bit codes must be torch.uint8 [elements * {bits} / 8], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    elements = packed.numel() * 8 // bits
    codes = torch.zeros(elements, dtype=torch.uint8, device=packed.device)
    planes = packed.split([elements * width // 8 for width in widths])
    shift = 0
    for plane, width in zip(planes, widths, strict=True):
        for index, run in enumerate(codes.view(8 // width, -1)):
            run |= ((plane >> (width * index)) & (2**width - 1)) << shift
        shift += width
    return codes


def _pack_plane(runs: torch.Tensor, width: int) -> torch.Tensor:
    plane = runs[0].clone()
    for index, run in enumerate(runs[1:], start=1):
        plane |= run << (width * index)
    return plane


def _plane_widths(bits: int) -> tuple[int, ...]:
    if bits not in _PLANE_WIDTHS:
        raise InputError(f"codes of {bits} bits cannot be packed; allowed: {tuple(_PLANE_WIDTHS)}")
    return _PLANE_WIDTHS[bits]
