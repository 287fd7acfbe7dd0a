"""Dense packing of weight codes: `elements · bits / 8` bytes exactly, in planes that unpack with shifts and masks.

A plane holds one field of `width` bits of every code, 8 / width codes to a byte. The codes, flattened in order and
counted n, are cut into 8 / width equal runs; byte i holds element i of every run, the first run in the lowest bits:

    width 4, n / 2 bytes: byte i = c[i] | c[i + n/2] << 4
    width 2, n / 4 bytes: byte i = c[i] | c[i + n/4] << 2 | c[i + 2n/4] << 4 | c[i + 3n/4] << 6
    width 1, n / 8 bytes: byte i = c[i] | c[i + n/8] << 1 | ... | c[i + 7n/8] << 7

Codes of 8, 4 and 2 bits are one plane (8 bits: the codes themselves). Other widths are two planes, one after the
other: 3 bits are the low two bits of every code (n / 4 bytes), then the high bit (n / 8 bytes); 5 and 6 bits are the
low four (n / 2 bytes), then the high bit or two (n / 8 or n / 4 bytes).

Consecutive codes lie in consecutive bytes, so any range of codes unpacks by itself, with vector instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lmq.errors import InputError

_PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths of the planes of each code width, lowest bits first."""

_BLOCK_BYTES = 1 << 18
"""Bytes of a plane that are packed or unpacked at a time: with what is made of them they stay in a core's cache."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes of any shape into uint8 [elements · bits / 8].

    Raises InputError for a width other than 2, 3, 4, 5, 6, 8, for codes that are not uint8 or exceed 2^bits - 1, and
    for a number of codes that is not a multiple of 8.
    """
    widths = _plane_widths(bits)
    if codes.dtype != torch.uint8 or codes.numel() % 8:
        raise InputError(
            f"codes to pack must be torch.uint8 and a multiple of 8 in number, not {codes.numel():,} of {codes.dtype}"
        )
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise InputError(f"code {int(codes.max())} does not fit {bits} bits; allowed: 0 to {2**bits - 1}")
    flat = codes.reshape(-1)
    packed = torch.empty(flat.numel() * bits // 8, dtype=torch.uint8, device=codes.device)
    for plane, width, shift in _planes(packed, widths):
        _pack_plane(flat.view(8 // width, -1), shift, width, plane)
    return packed


def unpack(
    packed: torch.Tensor, bits: int, start: int = 0, stop: int | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Inverse of `pack`: uint8 [stop - start], in the flattened order of the packed codes; all of them by default.

    They are written to the first elements of `out` where it is given, which saves the time to allocate.
    Raises InputError for a width other than 2, 3, 4, 5, 6, 8, and where `packed` or the range does not fit it.
    """
    widths = _plane_widths(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() % bits:
        raise InputError(
            f"packed {bits}-bit codes must be torch.uint8 [elements * {bits} / 8], "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    elements = packed.numel() * 8 // bits
    stop = elements if stop is None else stop
    if not 0 <= start <= stop <= elements:
        raise InputError(f"codes {start:,} to {stop:,} are not among the {elements:,} packed ones")
    if out is None:
        out = torch.empty(stop - start, dtype=torch.uint8, device=packed.device)
    codes = out[: stop - start]
    for plane, width, shift in _planes(packed, widths):
        for piece, run, first in _run_pieces(len(plane), start, stop):
            _unpack_piece(plane[piece], width * run, width, shift, codes[first : first + piece.stop - piece.start])
    return codes


def unpack_at(packed: torch.Tensor, bits: int, positions: torch.Tensor) -> torch.Tensor:
    """Codes at `positions` (int64, any shape) among the flattened ones: uint8 in the shape of the positions.

    The positions must be there: they are not looked at.
    """
    codes = torch.zeros(positions.shape, dtype=torch.uint8, device=packed.device)
    for plane, width, shift in _planes(packed, _plane_widths(bits)):
        field = plane[positions % len(plane)] >> (positions // len(plane) * width).to(torch.uint8)
        codes |= (field & 2**width - 1) << shift
    return codes


def _pack_plane(runs: torch.Tensor, shift: int, width: int, plane: torch.Tensor) -> None:
    """Fill the plane of the field of `width` bits at `shift` from the codes [8 / width, bytes of the plane]."""
    mask = 2**width - 1
    for start in range(0, len(plane), _BLOCK_BYTES):
        block = plane[start : start + _BLOCK_BYTES]
        block.zero_()
        for index, run in enumerate(runs[:, start : start + _BLOCK_BYTES]):
            field = run if width == 8 else (run >> shift if shift else run) & mask
            block |= field << (width * index) if index else field


def _run_pieces(run_elements: int, start: int, stop: int) -> Iterator[tuple[slice, int, int]]:
    """Bytes of a plane that hold the elements from `start` to `stop`: slice, index of the run, first element's place.

    Pieces of one run, which come one after the other, are elements that follow each other.
    """
    position = start
    while position < stop:
        run, first_byte = divmod(position, run_elements)
        count = min(run_elements - first_byte, stop - position, _BLOCK_BYTES)
        yield slice(first_byte, first_byte + count), run, position - start
        position += count


def _unpack_piece(stored: torch.Tensor, bit: int, width: int, shift: int, codes: torch.Tensor) -> None:
    """Write the field of `width` bits at `bit` of each byte to the bits at `shift` of each code."""
    if width == 8:
        codes.copy_(stored)
    elif shift:  # later planes join what the first one wrote
        moved = stored >> (bit - shift) if bit > shift else stored << (shift - bit)
        codes |= moved.bitwise_and_((2**width - 1) << shift)
    elif bit:
        torch.bitwise_right_shift(stored, bit, out=codes)
        if bit + width < 8:
            codes &= 2**width - 1
    else:
        torch.bitwise_and(stored, 2**width - 1, out=codes)


def _planes(packed: torch.Tensor, widths: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Each plane, its width, and where its field lies in a code."""
    eighth = len(packed) // sum(widths)
    first_byte = shift = 0
    for width in widths:
        yield packed[first_byte : first_byte + eighth * width], width, shift
        first_byte += eighth * width
        shift += width


def _plane_widths(bits: int) -> tuple[int, ...]:
    if bits not in _PLANE_WIDTHS:
        raise InputError(f"codes of {bits} bits cannot be packed; allowed: {tuple(_PLANE_WIDTHS)}")
    return _PLANE_WIDTHS[bits]
