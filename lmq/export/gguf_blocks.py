"""Blocks of GGUF weights from a grid of lmq's own: a matrix is fitted anew to a type that llama.cpp multiplies with.

Q4_1 holds any grid of up to 4 bits whose groups are made of whole blocks: only d and m are rounded. Q2_K, Q3_K and Q4_K
are fitted to the grid's weights, so they add an error of their own. The types are those of `lmq.formats.gguf_types`.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from lmq.formats.gguf_types import GGUF_TYPES, GgufGrid, pack_blocks

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GRID_BLOCKS = {
    GGMLQuantizationType.Q4_1: 32,
    GGMLQuantizationType.Q2_K: 16,
    GGMLQuantizationType.Q3_K: 16,
    GGMLQuantizationType.Q4_K: 32,
}
"""How many neighbouring weights share one scale, for the types that are made from a grid."""

_NEIGHBOURS = (0, -1, 1)
_Q3_RANGES = (1.0, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)


def encode(weight: Floats, scale: Floats, minimum: Floats, levels: int, kind: GGMLQuantizationType) -> Bytes:
    """The rows of `weight` as blocks of `kind`, uint8 [rows, bytes per row].

    `weight` [rows, columns] lies on `minimum + scale·q`, q in 0..levels - 1, with `scale` and `minimum`
    [rows, columns / GRID_BLOCKS[kind]]. F16 and Q8_0 need no grid and leave both unread.
    """
    if kind not in GRID_BLOCKS:
        return gguf.quants.quantize(weight, kind).view(np.uint8)
    blocks = weight.reshape(-1, gguf.GGML_QUANT_SIZES[kind][0])
    shape = (blocks.shape[0], -1)
    packed = _ENCODERS[kind](blocks, scale.reshape(shape), minimum.reshape(shape), levels)
    return packed.reshape(weight.shape[0], -1)


def decode(rows: Bytes, kind: GGMLQuantizationType) -> Floats:
    """The weights of `encode`, float32 [rows, columns]."""
    return gguf.quants.dequantize(rows, kind)


def _encode_q4_1(weight: Floats, scale: Floats, minimum: Floats, levels: int) -> Bytes:
    step = _float16(scale)
    # what rounding the scale moves is shared by both ends of the grid
    start = _float16(minimum + (scale - step) * np.float32((levels - 1) / 2))
    codes = _nearest(weight[:, None], step[..., None], start[..., None], 15)
    return _pack("q4_1", [step, -start], np.ones_like(step), np.ones_like(step), codes)


def _encode_q2_k(weight: Floats, scale: Floats, minimum: Floats, levels: int) -> Bytes:
    return _pack("q2_k", *_fit_two_level(weight.reshape(-1, 16, 16), scale, minimum, levels, 15, 3))


def _encode_q4_k(weight: Floats, scale: Floats, minimum: Floats, levels: int) -> Bytes:
    return _pack("q4_k", *_fit_two_level(weight.reshape(-1, 8, 32), scale, minimum, levels, 63, 15))


def _encode_q3_k(weight: Floats, scale: Floats, minimum: Floats, levels: int) -> Bytes:
    groups = weight.reshape(-1, 16, 16)
    unit, scales = _fit_symmetric(groups)
    step = unit[..., None] * scales[..., None]
    return _pack("q3_k", [unit], scales, None, _nearest(groups, step, -4 * step, 7))


def _pack(name: str, units: list[Floats], scales: NDArray[Any], minima: NDArray[Any] | None, codes: Bytes) -> Bytes:
    """The bytes of blocks, uint8 [blocks, bytes], from d and e [blocks, 1], s and m [blocks, groups], and codes."""
    kind = GGUF_TYPES[name]
    shape = (len(scales), kind.block_size)
    minimum_unit = torch.from_numpy(units[1][:, 0]) if len(units) > 1 else None
    grid = GgufGrid(
        kind,
        shape,
        torch.from_numpy(units[0][:, 0]),
        torch.from_numpy(scales.astype(np.int16)),
        minimum_unit,
        None if minima is None else torch.from_numpy(minima.astype(np.int16)),
    )
    return pack_blocks(grid, torch.from_numpy(codes.reshape(shape))).numpy()


_ENCODERS = {
    GGMLQuantizationType.Q4_1: _encode_q4_1,
    GGMLQuantizationType.Q2_K: _encode_q2_k,
    GGMLQuantizationType.Q3_K: _encode_q3_k,
    GGMLQuantizationType.Q4_K: _encode_q4_k,
}


def _fit_two_level(
    groups: Floats, scale: Floats, minimum: Floats, levels: int, top_scale: int, top: int
) -> tuple[list[Floats], Bytes, Bytes, Bytes]:
    """Integer scales and minima of `groups` [blocks, groups, size]: d and e, s, m, and codes.

    The grid's own scale and minimum are rounded to multiples of d and e; of the integers nearest to them,
    the pair with the least squared error on the weights is kept.
    """
    scale = np.where(minimum > 0, scale + minimum / (levels - 1), scale)  # a minimum cannot be above 0
    depth = np.maximum(-minimum, 0)
    units = [_float16(part.max(axis=1, keepdims=True) / top_scale) for part in (scale, depth)]
    nearest = [
        _nearest(part, unit, np.zeros_like(unit), top_scale) for part, unit in zip((scale, depth), units, strict=True)
    ]
    best, best_error = nearest, np.full(scale.shape, np.inf, np.float32)
    for scale_move in _NEIGHBOURS:
        for depth_move in _NEIGHBOURS:
            moved = [
                np.clip(integer.astype(np.int16) + move, 0, top_scale).astype(np.uint8)
                for integer, move in zip(nearest, (scale_move, depth_move), strict=True)
            ]
            error = np.square(groups - _two_level_weights(groups, units, moved, top)[0]).sum(-1)
            better = error < best_error
            best = [np.where(better, new, old) for new, old in zip(moved, best, strict=True)]
            best_error = np.minimum(error, best_error)
    codes = _two_level_weights(groups, units, best, top)[1].reshape(-1, 256)
    return units, best[0], best[1], codes


def _two_level_weights(groups: Floats, units: list[Floats], integers: list[Bytes], top: int) -> tuple[Floats, Bytes]:
    """Weights and codes nearest to `groups` on the grids of the integer scales and minima."""
    step, depth = ((unit * integer)[..., None] for unit, integer in zip(units, integers, strict=True))
    codes = _nearest(groups, step, -depth, top)
    return step * codes - depth, codes


def _fit_symmetric(groups: Floats) -> tuple[Floats, NDArray[np.int8]]:
    """Unit float32 [blocks, 1] and signed scales int8 [blocks, groups] of `groups` [blocks, groups, size].

    The weight of largest magnitude takes code -4; smaller and larger steps are tried as well.
    """
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    candidates = np.stack([extreme / np.float32(-4) * np.float32(size) for size in _Q3_RANGES])
    step = _least_error(groups, candidates)
    unit = _float16(np.abs(step).max(axis=1, keepdims=True) / 31)
    nearest = np.rint(np.divide(step, unit, out=np.zeros_like(step), where=unit > 0))
    moved = np.stack([np.clip(nearest + move, -32, 31) for move in _NEIGHBOURS])
    scales = np.divide(_least_error(groups, moved * unit), unit, out=np.zeros_like(step), where=unit > 0)
    return unit, np.rint(scales).astype(np.int8)


def _least_error(groups: Floats, steps: Floats) -> Floats:
    """Of the candidate `steps` [candidates, blocks, groups], the one with the least squared error per group."""
    errors = []
    for step in steps[..., None]:
        codes = _nearest(groups, step, -4 * step, 7)
        errors.append(np.square(groups - step * (codes.astype(np.float32) - 4)).sum(-1))
    return np.take_along_axis(steps, np.argmin(errors, axis=0)[None], 0)[0]


def _nearest(values: Floats, step: Floats, start: Floats, top: int) -> Bytes:
    """Codes 0..top of `values` on `start + step·code`; 0 where the step is 0."""
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    return np.clip(np.rint((values - start) * inverse), 0, top).astype(np.uint8)


def _float16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)
