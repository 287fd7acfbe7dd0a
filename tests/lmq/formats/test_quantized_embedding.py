"""Rows of a quantized table of embeddings, and a head that shares it, against the dequantized matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmq.formats.groups import encode
from lmq.formats.packed_layer import QuantizedEmbedding, TiedHead, quantize_weight
from lmq.formats.packing import pack, unpack, unpack_at
from lmq.formats.spec import ALLOWED_BITS, ALLOWED_GROUP_SIZES, QuantSpec
from lmq.quantizers import quantizer

ROWS, COLUMNS = 64, 72
"""Groups of 16 to 256 straddle rows of 72 weights."""


def _table(spec: QuantSpec, *, dtype: torch.dtype = torch.float32, embed_scale: float = 1.0) -> QuantizedEmbedding:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    weight[5] = 0  # a padding token
    grid = encode(weight, *quantizer("rtn").fit(weight, spec), spec, 1)
    table = QuantizedEmbedding(ROWS, COLUMNS, spec, embed_scale=embed_scale, dtype=dtype)
    table.load_state_dict(quantize_weight(weight, grid))
    return table


@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("group_size", ALLOWED_GROUP_SIZES)
def test_rows_are_those_of_the_dequantized_matrix(bits: int, group_size: int) -> None:
    table = _table(QuantSpec(bits, group_size))
    token_ids = torch.tensor([[3, 63, 0], [5, 3, 17]])
    assert torch.allclose(table(token_ids), table.dequantize()[token_ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_codes_are_unpacked_at_any_places(bits: int) -> None:
    codes = torch.randint(2**bits, (1600,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    places = torch.randint(1600, (7, 30), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert torch.equal(unpack_at(packed, bits, places), unpack(packed, bits)[places])


def test_rows_follow_the_type_of_the_model_and_are_scaled() -> None:
    table = _table(QuantSpec(4, 64), embed_scale=8.5)
    rows = table.to(torch.bfloat16)(torch.tensor([1, 2]))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, table.dequantize(torch.bfloat16)[1:3] * torch.tensor(8.5, dtype=torch.bfloat16))
    dense = table.to_embedding(torch.float32)
    assert torch.allclose(dense(torch.tensor([1, 2])), table.dequantize()[1:3] * 8.5)
    assert table.get_buffer("matrix_range").dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_tied_head_multiplies_with_the_table_and_has_no_tensors_of_its_own(tokens: int) -> None:
    table = _table(QuantSpec(5, 32))
    bias = nn.Parameter(torch.randn(ROWS))
    head = TiedHead(table, bias)
    inputs = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(4))
    expected = inputs @ table.dequantize().t() + bias
    assert torch.allclose(head(inputs), expected, atol=1e-4)
    assert list(head.state_dict()) == ["bias"]
    dense = table.to_embedding(torch.float32)
    linear = head.to_linear(dense.get_parameter("weight"))
    assert linear.weight is dense.weight
    assert torch.allclose(linear(inputs), expected, atol=1e-4)
