"""Types of GGUF against the gguf package, which reads them on its own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lmq.errors import InputError
from lmq.formats.gguf_types import GGUF_TYPES, decode_blocks, pack_blocks, unpack_blocks

ROWS, COLUMNS = 7, 512


def random_blocks(name: str, seed: int = 0) -> torch.Tensor:
    """Random bytes whose float16 values are finite: d and e are drawn apart."""
    kind = GGUF_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (ROWS * COLUMNS // kind.block_size, kind.block_bytes), generator=generator)
    blocks = blocks.to(torch.uint8)
    place = 0
    for part in kind.order:
        size = kind.part_bytes(part)
        if part in ("d", "e"):
            drawn = torch.randn(len(blocks), 1, generator=generator).half()
            blocks[:, place : place + size] = drawn.view(torch.uint8)
        place += size
    return blocks.view(ROWS, -1)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_sizes_and_numbers_are_those_of_gguf(name: str) -> None:
    kind = GGUF_TYPES[name]
    number = GGMLQuantizationType[name.upper()]
    assert kind.number == number.value
    assert (kind.block_size, kind.block_bytes) == GGML_QUANT_SIZES[number]
    assert kind.size_bytes(5, 256) == 5 * gguf.quant_shape_to_byte_shape((5, 256), number)[1]


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_decodes_as_the_gguf_package(name: str) -> None:
    stored = random_blocks(name)
    expected = gguf.quants.dequantize(stored.numpy(), GGMLQuantizationType[name.upper()])
    found = decode_blocks(stored, GGUF_TYPES[name], (ROWS, COLUMNS))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_packs_to_the_same_bytes(name: str) -> None:
    stored = random_blocks(name, seed=1)
    grid, codes = unpack_blocks(stored, GGUF_TYPES[name], (ROWS, COLUMNS))
    torch.testing.assert_close(pack_blocks(grid, codes), stored, rtol=0, atol=0)
    scale, zero = grid.decode()
    assert scale.shape == zero.shape == (ROWS * COLUMNS // GGUF_TYPES[name].group_size,)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
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
    assert all(kind.of_rows(768) is kind for kind in GGUF_TYPES.values())
    assert GGUF_TYPES["q4_k"].size_bytes(2, 576) == GGUF_TYPES["q5_0"].size_bytes(2, 576) == 2 * 18 * 22


def test_rows_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(InputError, match=r"q4_0 does not fit rows of 100 weights.*multiple of 32"):
        GGUF_TYPES["q4_0"].of_rows(100)


def test_bytes_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be torch.uint8 \[7, 288\], not torch.uint8 \[6, 288\]"):
        decode_blocks(random_blocks("q4_k")[:6], GGUF_TYPES["q4_k"], (ROWS, COLUMNS))
