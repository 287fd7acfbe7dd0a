"""Matrices of 4-bit floats (E2M1) as checkpoints of compressed-tensors hold them.

A matrix [out_features, in_features] becomes

- `weight_packed` uint8 [out_features, in_features / 2]: two codes to a byte, the first in the lower bits;
- `weight_scale`: of mxfp4 E8M0 in uint8 [out_features, in_features / 32], of nvfp4 float8_e4m3fn
  [out_features, in_features / 16];
- `weight_global_scale` float32 [1], nvfp4 only: what the scales are divided by. It is a power of two here, so that
  bfloat16 holds every weight as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lmq.formats.gguf_types import E8M0, GgufGrid, GgufMatrix, unpack_blocks

_LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max


def largest_scale(matrix: GgufMatrix) -> float:
    """The largest scale of a matrix in mxfp4 or nvfp4."""
    return float(_unpacked(matrix)[0].unit.max())


def float4_tensors(matrix: GgufMatrix, largest: float) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a matrix in mxfp4 or nvfp4, and the weight float32 that they stand for.

    `largest` is the largest scale of all matrices that an engine joins with this one: those in nvfp4 share their
    global scale. Scales more than 2^14 below it are rounded.
    """
    grid, codes = _unpacked(matrix)
    stored_codes = codes.new_tensor(matrix.kind.stored_codes)[codes.int()]
    packed = stored_codes[:, 0::2] | stored_codes[:, 1::2] << 4
    per_row = (matrix.shape[0], -1)
    if matrix.kind.unit == E8M0:
        scale = E8M0.byte(grid.unit).to(torch.uint8).view(per_row)
        return {"weight_packed": packed, "weight_scale": scale}, grid.weights(codes)
    global_scale = 2.0 ** -math.ceil(math.log2(largest / _LARGEST_E4M3))
    scale = (grid.unit * global_scale).to(torch.float8_e4m3fn)
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale.view(per_row),
        "weight_global_scale": torch.tensor([global_scale]),
    }
    return tensors, replace(grid, unit=scale.float() / global_scale).weights(codes)


def _unpacked(matrix: GgufMatrix) -> tuple[GgufGrid, Tensor]:
    return unpack_blocks(matrix.blocks, matrix.kind, matrix.shape)
