"""Types of GGUF against the gguf package, which reads them on its own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lmq.errors import InputError
from lmq.formats.gguf_types import GGUF_TYPES, LLAMA_CPP_TYPES, decode_blocks, pack_blocks, unpack_blocks

ROWS, COLUMNS = 7, 512


def random_blocks(name: str, seed: int = 0) -> torch.Tensor:
    """Random bytes whose float16 values are finite: d and e are drawn apart. No code is that of -0 or NaN."""
    kind = GGUF_TYPES[name].of_rows(COLUMNS)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (ROWS * COLUMNS // kind.block_size, kind.block_bytes), generator=generator)
    blocks = blocks.to(torch.uint8)
    place = 0
    for part in kind.order:
        size = kind.part_bytes(part)
        if part == "d" and kind.unit is not None:
            blocks[:, place] = torch.randint(100, 140, (len(blocks),), generator=generator)
        elif part in ("d", "e"):
            drawn = torch.randn(len(blocks), 1, generator=generator).half()
            blocks[:, place : place + size] = drawn.view(torch.uint8)
        elif kind.stored_codes is not None and kind.bits == 8:
            codes = blocks[:, place : place + size]
            codes[torch.isin(codes, torch.tensor([0x7F, 0x80, 0xFF], dtype=torch.uint8))] = 0
        elif kind.stored_codes is not None:
            codes = blocks[:, place : place + size]
            codes[codes & 15 == 8] -= 8
            codes[codes >> 4 == 8] &= 15
        place += size
    return blocks.view(ROWS, -1)


@pytest.mark.parametrize("name", LLAMA_CPP_TYPES)
def test_sizes_and_numbers_are_those_of_gguf(name: str) -> None:
    kind = GGUF_TYPES[name]
    number = GGMLQuantizationType[name.upper()]
    assert kind.number == number.value
    assert (kind.block_size, kind.block_bytes) == GGML_QUANT_SIZES[number]
    assert kind.size_bytes(5, 256) == 5 * gguf.quant_shape_to_byte_shape((5, 256), number)[1]


def test_nvfp4_is_that_of_gguf_with_the_scale_of_the_matrix_in_those_of_its_groups() -> None:
    """GGUF has four groups of 16 together: their scales in E4M3, then their codes. A matrix's own scale lies apart."""
    kind, number = GGUF_TYPES["nvfp4"], GGMLQuantizationType.NVFP4
    assert kind.number == number.value
    assert kind.bits_per_weight == 8 * GGML_QUANT_SIZES[number][1] / GGML_QUANT_SIZES[number][0]
    stored = random_blocks("nvfp4").view(-1, 4, kind.block_bytes)
    scales = torch.randint(8, 0x7F, (len(stored), 4), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    theirs = torch.cat([scales, stored[:, :, 1:].reshape(len(stored), -1)], dim=1).view(ROWS, -1)
    expected = gguf.quants.dequantize(theirs.numpy(), number)
    assert kind.unit is not None
    stored[:, :, 0] = kind.unit.byte(scales.view(torch.float8_e4m3fn).float() * 2.0**-9).to(torch.uint8)
    found = decode_blocks(stored.reshape(ROWS, -1), kind, (ROWS, COLUMNS))
    np.testing.assert_array_equal(found.numpy(), expected * 2.0**-9)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8"])
def test_units_of_one_byte_are_the_nearest(name: str) -> None:
    unit = GGUF_TYPES[name].unit
    assert unit is not None
    assert torch.equal(unit.byte(unit.value(torch.arange(1, 255))), torch.arange(1, 255, dtype=torch.int32))
    every = unit.value(torch.arange(1, 255)).double().numpy()
    assert (every[1:] > every[:-1]).all()
    values = torch.rand(1000, generator=torch.Generator().manual_seed(6)) * torch.logspace(-7, 4, 1000)
    nearest = every[np.abs(values.double().numpy()[:, None] - every).argmin(1)]
    np.testing.assert_array_equal(unit.value(unit.byte(values)).double().numpy(), nearest)
    assert unit.byte(torch.zeros(1)) == 1


@pytest.mark.parametrize("name", LLAMA_CPP_TYPES)
def test_decodes_as_the_gguf_package(name: str) -> None:
    stored = random_blocks(name)
    expected = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType[name.upper()])
    found = decode_blocks(stored, GGUF_TYPES[name], (ROWS, COLUMNS))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_packs_to_the_same_bytes(name: str) -> None:
    stored, kind = random_blocks(name, seed=1), GGUF_TYPES[name].of_rows(COLUMNS)
    grid, codes = unpack_blocks(stored, kind, (ROWS, COLUMNS))
    torch.testing.assert_close(pack_blocks(grid, codes), stored, rtol=0, atol=0)
    scale, zero = grid.decode()
    assert scale.shape == zero.shape == (ROWS * COLUMNS // kind.group_size,)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_reads_what_the_gguf_package_quantizes(name: str) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    number = GGMLQuantizationType[name.upper()]
    stored = torch.from_numpy(gguf.quants.quantize(weight.numpy(), number).view(np.uint8))
    found = decode_blocks(stored, GGUF_TYPES[name], (3, 64))
    np.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(stored.numpy(), number))


def test_rows_that_are_no_multiple_of_256_take_the_type_of_llama_cpp() -> None:
    """As `tensor_type_fallback` of llama.cpp has it."""
    taken = {name: kind.of_rows(576).name for name, kind in GGUF_TYPES.items() if kind.block_size == 256}
    assert taken == {
        "q2_k": "q4_0",
        "q3_k": "q4_0",
        "iq4_xs": "iq4_nl",
        "q4_k": "q5_0",
        "q5_k": "q5_1",
        "q6_k": "q8_0",
    }
    assert all(kind.of_rows(768) is kind for kind in GGUF_TYPES.values() if kind.block_size)
    assert GGUF_TYPES["q4_k"].size_bytes(2, 576) == GGUF_TYPES["q5_0"].size_bytes(2, 576) == 2 * 18 * 22


def test_rows_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(InputError, match=r"q4_0 does not fit rows of 100 weights.*multiple of 32"):
        GGUF_TYPES["q4_0"].of_rows(100)
    with pytest.raises(InputError, match=r"mxfp4 does not fit rows of 48 weights.*multiple of 32"):
        GGUF_TYPES["mxfp4"].of_rows(48)


def test_nvfp4_takes_rows_of_16() -> None:
    assert GGUF_TYPES["nvfp4"].size_bytes(2, 48) == 2 * 3 * 9
    with pytest.raises(InputError, match=r"nvfp4 does not fit rows of 40 weights.*multiple of 16"):
        GGUF_TYPES["nvfp4"].of_rows(40)


def test_bytes_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be torch.uint8 \[7, 288\], not torch.uint8 \[6, 288\]"):
        decode_blocks(random_blocks("q4_k")[:6], GGUF_TYPES["q4_k"], (ROWS, COLUMNS))
