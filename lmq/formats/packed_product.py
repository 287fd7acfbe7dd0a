"""Products with a weight matrix that stays packed: `x Ŵᵀ` from its codes and grid, a block of Ŵ at a time.

Two ways, which round differently in the last bits:

- Many tokens: blocks of Ŵ are made in float32, bit for bit as `Grid.dequantize` makes them, and multiplied in the dtype
  of the inputs. A block stays in the processor's cache, so that Ŵ costs neither memory nor traffic to memory.
- A few tokens on a processor, where making Ŵ costs more than the product: codes are multiplied as they are, in float32,
  and each group's scale s and zero z join afterwards:

      y[r] = Σ_g s[r,g] (Σ_k q[r,g,k] x[g,k]) − s[r,g] z[r,g] Σ_k x[g,k]

  For inputs of 16 bits this is nearer to the exact product than the first way, as Ŵ is not rounded to them.

The gradient of the inputs is made from blocks again; codes and grid have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmq.formats.gguf_types import GgufMatrix, decode_blocks
from lmq.formats.groups import decode_grid, from_groups
from lmq.formats.packing import unpack, unpack_at
from lmq.formats.spec import QuantSpec
from lmq.numerics import linear, without_base

FEW_TOKENS = 8
"""Up to so many tokens, codes are multiplied as they are."""

_FEW_TOKENS_BLOCK = 1 << 18
_CPU_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 24
"""Elements of a block: what is made of them, 5 bytes each, stays in cache. A product of many tokens likes more rows."""

_SHORTEST_PIECE = 16
"""Groups that straddle rows are cut where rows end; with fewer columns to a piece, multiplying pieces does not pay."""


def packed_linear(inputs: Tensor, weight: PackedWeight | GgufWeight, bias: Tensor | None = None) -> Tensor:
    """Outputs [..., out_features] of `inputs` [..., in_features], in their dtype; differentiable in inputs and bias."""
    if torch.compiler.is_compiling():  # a compiler fuses the unpacking, and would unroll the blocks
        return nn.functional.linear(inputs, weight.dequantize(inputs.dtype), bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (inputs, bias)):
        outputs: Tensor = _PackedLinear.apply(inputs, weight, bias)
        return outputs
    return _multiply(inputs, weight, bias)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PackedWeight:
    """A matrix of `shape` [out_features, in_features] as stored: packed codes, and the tensors of their grid."""

    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    scale_ranges: Tensor
    matrix_range: Tensor
    spec: QuantSpec
    shape: tuple[int, int]
    axis: int

    @property
    def is_grouped_by_columns(self) -> bool:
        """Whether the grid has axis 0 and every group holds weights of one column only."""
        return self.axis == 0 and self.shape[0] % self.spec.group_size == 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ [out_features, in_features], made in float32 and rounded to `dtype`."""
        if torch.compiler.is_compiling() or (self.axis == 0 and not self.is_grouped_by_columns):
            scale, zero = self._scale_and_zero()
            codes = unpack(self.codes, self.spec.bits).view(-1, self.spec.group_size)
            groups = codes.to(torch.float32).sub_(zero[:, None]).mul_(scale[:, None])
            return from_groups(groups, self.shape, self.axis).to(dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows, block in self._row_blocks(_FEW_TOKENS_BLOCK) if self.axis == 1 else self.blocks():
            weight[rows] = block
        return weight

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of Ŵ, float32 [rows, in_features], of a grid with axis 1; only theirs is unpacked."""
        in_features, group_size = self.shape[1], self.spec.group_size
        positions = numbers.to(self.codes.device).long()[:, None] * in_features
        positions = positions + torch.arange(in_features, device=positions.device)
        groups = positions // group_size
        scale, zero = decode_grid(
            self.scale_codes[groups].view(-1),
            self.zero_codes[groups].view(-1),
            self.scale_ranges[groups // self.spec.meta_group_size].view(-1, 2),
            self.matrix_range,
            1,
        )
        codes = unpack_at(self.codes, self.spec.bits, positions).to(torch.float32)
        return codes.sub_(zero.view_as(codes)).mul_(scale.view_as(codes))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of Ŵ: the rows, and their weights float32 [rows, in_features], good until the next block is asked for.

        Rows of a grid with axis 0 are those of one group each column: every n-th.
        """
        if self.axis == 1:
            yield from self._row_blocks(_CPU_BLOCK if self.codes.device.type == "cpu" else _GPU_BLOCK)
        elif self.is_grouped_by_columns:
            yield from self._band_blocks()
        else:
            yield slice(None), self.dequantize()

    def few_tokens(self, inputs: Tensor) -> Tensor | None:
        """Product with a few float32 `inputs` [tokens, in_features]; None where the shape of the groups forbids it."""
        if self.is_grouped_by_columns:
            return self._few_by_bands(inputs)
        piece = math.gcd(self.spec.group_size, self.shape[1])
        return self._few_by_rows(inputs, piece) if self.axis == 1 and piece >= _SHORTEST_PIECE else None

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        return decode_grid(
            self.scale_codes, self.zero_codes, self.scale_ranges, self.matrix_range, self.spec.meta_group_size
        )

    def _row_blocks(self, block_elements: int) -> Iterator[tuple[slice, Tensor]]:
        in_features, group_size = self.shape[1], self.spec.group_size
        scale, zero = self._scale_and_zero()
        for rows, floats in self._float_codes(block_elements):
            of_rows = slice(rows.start * in_features // group_size, rows.stop * in_features // group_size)
            groups = floats.view(-1, group_size)
            yield rows, groups.sub_(zero[of_rows, None]).mul_(scale[of_rows, None]).view(-1, in_features)

    def _few_by_rows(self, inputs: Tensor, piece: int) -> Tensor:
        out_features, in_features = self.shape
        scale, zero = self._scale_and_zero()
        if piece < self.spec.group_size:  # a group is several pieces of rows
            pieces_per_group = self.spec.group_size // piece
            scale, zero = (values.repeat_interleave(pieces_per_group) for values in (scale, zero))
        scale, zero = (values.view(out_features, 1, -1).permute(2, 1, 0) for values in (scale, zero))
        pieces = inputs.view(len(inputs), -1, piece).transpose(0, 1)  # [pieces, tokens, piece]
        negative_sums = pieces.sum(2, keepdim=True).neg_()
        outputs = inputs.new_empty(len(inputs), out_features)
        for rows, floats in self._float_codes(_FEW_TOKENS_BLOCK):
            columns = floats.view(-1, in_features // piece, piece).permute(1, 2, 0)
            products = torch.baddbmm(zero[:, :, rows] * negative_sums, pieces, columns)  # [pieces, tokens, rows]
            outputs[:, rows] = products.mul_(scale[:, :, rows]).sum(0)
        return outputs

    def _float_codes(self, block_elements: int) -> Iterator[tuple[slice, Tensor]]:
        """Codes of blocks of rows as float32 [elements], rows in whole groups; good until the next is asked for."""
        out_features, in_features = self.shape
        blocks = max(1, round(out_features * in_features / block_elements))
        whole_groups = self.spec.group_size // math.gcd(self.spec.group_size, in_features)
        step = min(out_features, math.ceil(out_features / blocks / whole_groups) * whole_groups)
        codes = self.codes.new_empty(step * in_features)
        floats = torch.empty(step * in_features, device=self.codes.device)
        for first in range(0, out_features, step):
            rows = slice(first, min(first + step, out_features))
            elements = slice(rows.start * in_features, rows.stop * in_features)
            block = unpack(self.codes, self.spec.bits, elements.start, elements.stop, out=codes)
            yield rows, floats[: len(block)].copy_(block)

    @property
    def _bands(self) -> int:
        """Of a grid grouped by columns: groups of a column. Their codes follow each other, [bands, columns, group]."""
        return self.shape[0] // self.spec.group_size

    def _band_codes(self, band: int) -> Tensor:
        """Float32 [in_features, group_size]; the codes of rows band, band + bands, ..."""
        elements = self.spec.group_size * self.shape[1]
        codes = unpack(self.codes, self.spec.bits, band * elements, (band + 1) * elements)
        return codes.to(torch.float32).view(-1, self.spec.group_size)

    def _band_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        scale, zero = (values.view(self._bands, -1, 1) for values in self._scale_and_zero())
        for band in range(self._bands):
            yield slice(band, None, self._bands), self._band_codes(band).sub_(zero[band]).mul_(scale[band]).t()

    def _few_by_bands(self, inputs: Tensor) -> Tensor:
        """Scale and zero belong to columns of a band, so that they join the inputs."""
        scale, zero = (values.view(self._bands, 1, -1) for values in self._scale_and_zero())
        outputs = torch.empty(len(inputs), self.shape[0])
        for band in range(self._bands):
            scaled = inputs * scale[band]
            of_zeros = scaled @ zero[band].t()
            outputs[:, band :: self._bands] = torch.mm(scaled, self._band_codes(band)).sub_(of_zeros)
        return outputs


@dataclass(frozen=True, eq=False, slots=True)
class GgufWeight:
    """A matrix in a type of GGUF, which is unpacked for every product, a block of rows at a time."""

    matrix: GgufMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """out_features, in_features."""
        return self.matrix.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ [out_features, in_features], made in float32 and rounded to `dtype`."""
        return self.matrix.dequantize().to(dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of Ŵ, float32 [rows, in_features]; only theirs is unpacked."""
        stored = self.matrix.blocks[numbers.to(self.matrix.blocks.device)]
        return decode_blocks(stored, self.matrix.kind, (len(stored), self.shape[1]))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of Ŵ: the rows, and their weights float32 [rows, in_features]."""
        out_features, in_features = self.shape
        on_cpu = self.matrix.blocks.device.type == "cpu"
        step = max(1, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            yield rows, self.matrix.dequantize(rows)

    def few_tokens(self, inputs: Tensor) -> Tensor | None:
        """None: its codes are not multiplied as they are."""
        return None


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: PackedWeight | GgufWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return without_base(_multiply(inputs, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        of_inputs = _multiply_transposed(gradient, ctx.weight) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_inputs, None, of_bias


def _multiply(inputs: Tensor, weight: PackedWeight | GgufWeight, bias: Tensor | None) -> Tensor:
    out_features, in_features = weight.shape
    tokens = inputs.numel() // in_features
    if 0 < tokens <= FEW_TOKENS and inputs.device.type == "cpu" and inputs.dtype != torch.float64:
        product = weight.few_tokens(inputs.reshape(tokens, in_features).to(torch.float32))
        if product is not None:
            product = product if bias is None else product.add_(bias)
            return product.to(inputs.dtype).view(*inputs.shape[:-1], out_features)
    outputs = None
    for rows, block in weight.blocks():
        product = linear(inputs, block.to(inputs.dtype), None if bias is None else bias[rows])
        if product.shape[-1] == out_features:
            return product
        if outputs is None:
            outputs = product.new_empty(*inputs.shape[:-1], out_features)
        outputs[..., rows] = product
    assert outputs is not None  # a matrix has a block
    return outputs


def _multiply_transposed(gradient: Tensor, weight: PackedWeight | GgufWeight) -> Tensor:
    """`gradient` [..., out_features] times Ŵ, summed over blocks in float32 or better."""
    sums = gradient.new_zeros(
        *gradient.shape[:-1], weight.shape[1], dtype=torch.promote_types(gradient.dtype, torch.float32)
    )
    for rows, block in weight.blocks():
        sums += gradient[..., rows] @ block.to(gradient.dtype)
    return sums.to(gradient.dtype)
