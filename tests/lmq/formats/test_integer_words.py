from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import DamagedFile, InputError
from lmq.formats.integer_words import (
    IntegerMatrix,
    awq_tensors,
    awq_weight,
    codes_per_block,
    gptq_tensors,
    gptq_weight,
    pack_words,
    unpack_words,
)


def _stream(codes: list[int], bits: int) -> list[int]:
    """Words of codes, by one large number: code i takes the bits from i·bits."""
    number = sum(code << index * bits for index, code in enumerate(codes))
    words = [number >> start & 2**32 - 1 for start in range(0, len(codes) * bits, 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_words_are_one_stream_of_bits(bits: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, blocks * codes_per_block(bits)), generator=generator).to(torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [_stream(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_words(words, bits), codes)


def test_three_bits_straddle_words_as_gptq_has_them() -> None:
    """Ten codes, the low two bits of the next, its high bit, ten codes, ... as GPTQ's 3-bit kernels were written."""
    codes = torch.arange(32) % 8
    c = codes.tolist()
    first = sum(c[i] << 3 * i for i in range(10)) | c[10] << 30
    second = c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | c[21] << 31
    third = c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10))
    expected = [word & 2**32 - 1 for word in (first, second, third)]
    assert [word & 2**32 - 1 for word in pack_words(codes.to(torch.uint8), 3).tolist()] == expected


def test_codes_that_fill_no_words_are_refused() -> None:
    with pytest.raises(InputError, match="24 codes of 3 bits fill no whole words; give a multiple of 32"):
        pack_words(torch.zeros(2, 24, dtype=torch.uint8), 3)
    with pytest.raises(InputError, match="2 words hold no whole codes of 3 bits"):
        unpack_words(torch.zeros(2, dtype=torch.int32), 3)


def _matrix(bits: int, *, symmetric: bool = False, out_features: int = 64) -> IntegerMatrix:
    generator = torch.Generator().manual_seed(bits)
    zero = torch.randint(2**bits, (out_features, 3), generator=generator).to(torch.uint8)
    return IntegerMatrix(
        bits=bits,
        codes=torch.randint(2**bits, (out_features, 96), generator=generator).to(torch.uint8),
        scale=torch.rand(out_features, 3, generator=generator).half(),
        zero=torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero,
    )


def _weight(matrix: IntegerMatrix) -> torch.Tensor:
    """(q - z)·s, element by element, in float64."""
    codes, scale, zero = matrix.codes.tolist(), matrix.scale.double().tolist(), matrix.zero.tolist()
    return torch.tensor(
        [
            [(q - zero[row][column // 32]) * scale[row][column // 32] for column, q in enumerate(line)]
            for row, line in enumerate(codes)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_a_matrix_comes_back_from_the_layout_of_gptq(bits: int, zero_offset: int) -> None:
    matrix = _matrix(bits, symmetric=bool(zero_offset))
    assert matrix.is_symmetric == bool(zero_offset)
    tensors = gptq_tensors(matrix, zero_offset=zero_offset)
    assert tensors["qweight"].shape == (96 * bits // 32, 64)
    assert tensors["qzeros"].shape == (3, 64 * bits // 32)
    stored = unpack_words(tensors["qzeros"], bits)
    assert torch.equal(stored + zero_offset, matrix.zero.t())
    weight = gptq_weight(tensors, zero_offset=zero_offset)
    assert torch.allclose(weight.double(), _weight(matrix), rtol=1e-6)
    assert torch.equal(weight, matrix.dequantize())


def test_columns_in_another_order_have_their_groups() -> None:
    matrix = _matrix(4)
    tensors = gptq_tensors(matrix, zero_offset=0)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    moved = {
        **tensors,
        "qweight": pack_words(matrix.codes[:, order], 4).t(),
        "g_idx": tensors["g_idx"][order],
    }
    assert torch.equal(gptq_weight(moved, zero_offset=0), matrix.dequantize()[:, order])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_zero_of_0_borrows_from_its_neighbours_is_given_back(bits: int) -> None:
    matrix = _matrix(bits)
    assert (matrix.zero == 0).any() or bits == 8
    tensors = gptq_tensors(matrix, zero_offset=0)
    less = sum(1 << bit for bit in range(0, 32, bits))
    stored = {**tensors, "qzeros": tensors["qzeros"] - less}  # as GPTQModel takes 1 from whole words
    assert torch.equal(gptq_weight(stored, zero_offset=1), matrix.dequantize())


def test_a_matrix_comes_back_from_the_layout_of_awq() -> None:
    matrix = _matrix(4)
    tensors = awq_tensors(matrix)
    assert tensors["qweight"].shape == (96, 8)
    first = tensors["qweight"][5, 0].item() & 2**32 - 1
    assert [first >> 4 * slot & 15 for slot in range(8)] == [matrix.codes[row, 5] for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert torch.equal(awq_weight(tensors), matrix.dequantize())


def test_tensors_that_do_not_go_together_are_refused() -> None:
    three, four = (gptq_tensors(_matrix(bits), zero_offset=0) for bits in (3, 4))
    for tensors in ({**four, "qweight": three["qweight"][:, :32]}, {**four, "scales": four["scales"][:, :32]}):
        with pytest.raises(DamagedFile, match="are not those of one matrix"):
            gptq_weight(tensors, zero_offset=0)
    with pytest.raises(DamagedFile, match="g_idx names no group for each of 96 columns, of which there are 3"):
        gptq_weight({**four, "g_idx": four["g_idx"] + 1}, zero_offset=0)
    without = {name: tensor for name, tensor in four.items() if name != "g_idx"}
    assert torch.equal(gptq_weight(without, zero_offset=0), gptq_weight(four, zero_offset=0))
    with pytest.raises(DamagedFile, match="rows of 88 weights are not 3 groups of one size, and there is no g_idx"):
        gptq_weight({**without, "qweight": four["qweight"][:-1]}, zero_offset=0)
    with pytest.raises(DamagedFile, match="are not those of one matrix of 4 bits"):
        awq_weight({**awq_tensors(_matrix(4)), "scales": torch.ones(3, 32)})
