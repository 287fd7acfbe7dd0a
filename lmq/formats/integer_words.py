"""Integer codes in 32-bit words, as files of GPTQ, AutoRound, AWQ and compressed-tensors hold them.

Codes of b bits are one little-endian stream of bits: of 32 codes, which fill b words, code i takes the bits from i·b.
With 2, 4 and 8 bits no code straddles two words; with 3 bits the codes 10 and 21 do.

A matrix [out_features, in_features] with a scale and a whole zero for each group of g weights of a row is

- in GPTQ's layout: `qweight` int32 [in_features · b / 32, out_features], `qzeros` int32 [groups of a row,
  out_features · b / 32], `scales` float16 [groups of a row, out_features]; `g_idx` int32 [in_features] is the group of
  every column, which AutoRound leaves out. Zeros are stored as they are (`gptq_v2`, `auto_round`), or less 1 (`gptq`,
  `auto_round:auto_gptq`).
- in AWQ's: `qweight` int32 [in_features, out_features / 8], `qzeros` int32 [groups of a row, out_features / 8],
  `scales` as above; 4 bits only, and of 8 rows of the matrix a word holds 0, 2, 4, 6, 1, 3, 5, 7, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from lmq.errors import DamagedFile, InputError

WORD_BITS = 32
AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD_MASK = 2**WORD_BITS - 1


def codes_per_block(bits: int) -> int:
    """The fewest codes that fill whole words: what the length of a packed dimension is a multiple of."""
    return WORD_BITS // gcd(bits, WORD_BITS)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] of `bits` below 9 as int32 [..., n · bits / 32]. Raises InputError where they fill no words."""
    count = codes_per_block(bits)
    if codes.shape[-1] % count:
        raise InputError(f"{codes.shape[-1]} codes of {bits} bits fill no whole words; give a multiple of {count}")
    blocks = codes.reshape(*codes.shape[:-1], -1, count)
    words = torch.zeros(*blocks.shape[:-1], count * bits // WORD_BITS, dtype=torch.int64, device=codes.device)
    for number in range(count):
        word, bit = divmod(number * bits, WORD_BITS)
        code = blocks[..., number].long()
        words[..., word] |= code << bit & _WORD_MASK
        if bit + bits > WORD_BITS:
            words[..., word + 1] |= code >> (WORD_BITS - bit)
    signed = torch.where(words >= 2 ** (WORD_BITS - 1), words - 2**WORD_BITS, words)
    return signed.int().reshape(*codes.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: uint8 [..., words · 32 / bits]. Raises InputError where they hold no whole codes."""
    count = codes_per_block(bits)
    per_block = count * bits // WORD_BITS
    if words.shape[-1] % per_block:
        raise InputError(f"{words.shape[-1]} words hold no whole codes of {bits} bits")
    blocks = words.reshape(*words.shape[:-1], -1, per_block).long() & _WORD_MASK
    codes = torch.empty(*blocks.shape[:-1], count, dtype=torch.uint8, device=words.device)
    for number in range(count):
        word, bit = divmod(number * bits, WORD_BITS)
        code = blocks[..., word] >> bit
        if bit + bits > WORD_BITS:
            code = code | blocks[..., word + 1] << (WORD_BITS - bit)
        codes[..., number] = code & 2**bits - 1
    return codes.reshape(*words.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerMatrix:
    """Codes uint8 [out_features, in_features] of `bits`, and scale and zero [out_features, groups of a row].

    Code q stands for the weight (q - zero) · scale; zeros are whole, uint8.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def group_size(self) -> int:
        """Weights of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero is the middle of the codes."""
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The weight, float32 [out_features, in_features]."""
        groups = self.codes.view(*self.scale.shape, -1).float()
        weights = groups.sub_(self.zero[..., None].float()).mul_(self.scale[..., None].float())
        return weights.view(self.codes.shape)


def gptq_tensors(matrix: IntegerMatrix, *, zero_offset: int, column_groups: bool = True) -> dict[str, Tensor]:
    """The tensors of a matrix in GPTQ's layout; stored zeros are less `zero_offset`, 0 or 1, which none is below.

    `column_groups`: with `g_idx`.
    """
    tensors = {
        "qweight": pack_words(matrix.codes, matrix.bits).t().contiguous(),
        "qzeros": pack_words(matrix.zero.t() - zero_offset, matrix.bits),
        "scales": matrix.scale.t().contiguous(),
    }
    if column_groups:
        columns = torch.arange(matrix.codes.shape[1], dtype=torch.int32)
        tensors["g_idx"] = columns // matrix.group_size
    return tensors


def gptq_weight(tensors: Mapping[str, Tensor], *, zero_offset: int) -> Tensor:
    """The weight float32 [out_features, in_features] of tensors in GPTQ's layout, with `g_idx` or without.

    Programs take the offset from whole words, so that what a zero of 0 borrows from its neighbours is given back here.
    Raises DamagedFile where the tensors are not those of one matrix.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, out_features = scales.shape
    bits = qzeros.shape[1] * WORD_BITS // out_features
    in_features = qweight.shape[0] * WORD_BITS // max(bits, 1)
    whole = bits * out_features == qzeros.shape[1] * WORD_BITS and bits * in_features == qweight.shape[0] * WORD_BITS
    if not whole or qweight.shape[1] != out_features or len(qzeros) != groups:
        raise DamagedFile(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are not those "
            "of one matrix"
        )
    group_of = tensors.get("g_idx")
    if group_of is None and in_features % groups:
        raise DamagedFile(f"rows of {in_features} weights are not {groups} groups of one size, and there is no g_idx")
    group_of = torch.arange(in_features) // (in_features // groups) if group_of is None else group_of.long()
    if len(group_of) != in_features or int(group_of.max()) >= groups:
        raise DamagedFile(f"g_idx names no group for each of {in_features} columns, of which there are {groups}")
    if zero_offset and WORD_BITS % bits == 0:
        qzeros = qzeros + sum(zero_offset << bit for bit in range(0, WORD_BITS, bits))
        zero_offset = 0
    zeros = (unpack_words(qzeros, bits) + zero_offset) & 2**bits - 1
    codes = unpack_words(qweight.t(), bits)
    return (codes.float() - zeros.float()[group_of].t()).mul_(scales.float()[group_of].t())


def awq_tensors(matrix: IntegerMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix of 4 bits in AWQ's layout."""
    return {
        "qweight": pack_words(_interleaved(matrix.codes.t()), AWQ_BITS),
        "qzeros": pack_words(_interleaved(matrix.zero.t()), AWQ_BITS),
        "scales": matrix.scale.t().contiguous(),
    }


def awq_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight float32 [out_features, in_features] of tensors in AWQ's layout.

    Raises DamagedFile where the tensors are not those of one matrix.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    words = scales.shape[1] * AWQ_BITS // WORD_BITS
    if qweight.shape[1] != words or tuple(qzeros.shape) != (len(scales), words) or len(qweight) % len(scales):
        raise DamagedFile(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} are not those "
            f"of one matrix of {AWQ_BITS} bits"
        )
    codes, zeros = (_ordered(unpack_words(words, AWQ_BITS)) for words in (qweight, qzeros))
    matrix = IntegerMatrix(bits=AWQ_BITS, codes=codes.t().contiguous(), scale=scales.t(), zero=zeros.t())
    return matrix.dequantize()


def _interleaved(codes: Tensor) -> Tensor:
    """Codes [..., 8 k] with each 8 in the order in which a word of AWQ holds them."""
    return codes.unflatten(-1, (-1, len(_AWQ_ORDER)))[..., list(_AWQ_ORDER)].flatten(-2)


def _ordered(codes: Tensor) -> Tensor:
    """Inverse of `_interleaved`."""
    order = torch.tensor(_AWQ_ORDER).argsort().tolist()
    return codes.unflatten(-1, (-1, len(_AWQ_ORDER)))[..., order].flatten(-2)
