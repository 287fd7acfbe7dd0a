"""Matrices of 8-bit floats (E4M3) as checkpoints of compressed-tensors hold them.

A matrix [out_features, in_features] becomes

- `weight` float8_e4m3fn in that shape;
- `weight_scale` bfloat16 [out_features, 1]: what a row is multiplied by. It has 3 bits behind its leading one, as the
  weights have, so that bfloat16 holds the product of both as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmq.formats.gguf_types import GgufMatrix, unpack_blocks


def float8_tensors(matrix: GgufMatrix) -> dict[str, Tensor]:
    """The stored tensors of a matrix in fp8."""
    grid, codes = unpack_blocks(matrix.blocks, matrix.kind, matrix.shape)
    stored_codes = codes.new_tensor(matrix.kind.stored_codes)[codes.int()]
    return {"weight": stored_codes.view(torch.float8_e4m3fn), "weight_scale": grid.unit[:, None].to(torch.bfloat16)}
