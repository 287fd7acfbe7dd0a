"""8-bit floats against torch's own float8 and the compressed-tensors package, which casts and decompresses alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmq.allocation.targets import TARGETS
from lmq.formats.float8 import float8_tensors
from lmq.formats.gguf_types import GGUF_TYPES, GgufMatrix, unpack_blocks
from lmq.formats.spec import QuantSpec
from lmq.quantizers import quantizer
from lmq.quantizers.gguf_fit import nearest_matrix
from tests.lmq.random_matrices import correlated_moments, rows_of_different_spread

ROWS, COLUMNS = 24, 200
"""Rows of fp8 are of any length."""
FP8 = QuantSpec.parse("fp8")
LARGEST = 448.0


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return rows_of_different_spread(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def moments() -> Tensor:
    return correlated_moments(COLUMNS)


def nearest(weight: Tensor) -> GgufMatrix:
    return nearest_matrix(weight, torch.ones(weight.shape[1]), GGUF_TYPES["fp8"].of_rows(weight.shape[1]))


def usual_rounding(weight: Tensor) -> Tensor:
    """Scales that cover every row, torch's own cast."""
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def cost(quantized: Tensor, weight: Tensor, moments: Tensor) -> float:
    error = (quantized - weight).double()
    return float((error @ moments.double() * error).sum())


def test_levels_and_codes_are_those_of_torch() -> None:
    kind = GGUF_TYPES["fp8"]
    assert kind.stored_codes is not None
    values = torch.tensor(kind.stored_codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert values.tolist() == list(kind.levels)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert set(every[every.isfinite()].tolist()) == set(kind.levels)
    assert len(kind.levels) == 253


def test_minus_zero_is_read_as_zero() -> None:
    kind = GGUF_TYPES["fp8"].of_rows(2)
    grid, codes = unpack_blocks(torch.tensor([[100, 0x80, 0x38]], dtype=torch.uint8), kind, (1, 2))
    scale = float(grid.unit)
    assert grid.weights(codes).tolist() == [[0.0, scale]]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_stored_tensors_are_the_very_weights(factor: float, weight: Tensor) -> None:
    matrix = nearest(weight * factor)
    tensors, expected = float8_tensors(matrix), matrix.dequantize()
    assert (tensors["weight"].dtype, tensors["weight_scale"].shape) == (torch.float8_e4m3fn, (ROWS, 1))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal((tensors["weight"].to(dtype) * tensors["weight_scale"].to(dtype)).float(), expected)
    assert torch.equal(tensors["weight_scale"].half().float(), tensors["weight_scale"].float())
    assert matrix.size_bytes == FP8.size_bytes(ROWS * COLUMNS, COLUMNS) == ROWS * (COLUMNS + 1)
    written = sum(tensor.nbytes for tensor in tensors.values())
    assert written == TARGETS["vllm"].size_bytes(FP8, ROWS, COLUMNS) == ROWS * (COLUMNS + 2)


def test_the_package_decompresses_the_very_weights_and_casts_them_to_the_same(weight: Tensor) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="pip install 'lmq[vllm]'")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
    scheme: Any = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    assert compressors.format.infer_module_format(torch.nn.Linear, scheme).value == "naive-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry("naive-quantized")
    matrix = nearest(weight)
    tensors = float8_tensors(matrix)
    assert torch.equal(compressor.decompress(dict(tensors), scheme)["weight"].float(), matrix.dequantize())
    state = {"weight": matrix.dequantize(), "weight_scale": tensors["weight_scale"].float()}
    assert torch.equal(compressor.compress(state, scheme)["weight"].float(), tensors["weight"].float())


def test_codes_are_the_nearest_on_their_scale(weight: Tensor) -> None:
    matrix = nearest(weight)
    scale = float8_tensors(matrix)["weight_scale"].double()
    levels = np.array(GGUF_TYPES["fp8"].levels)
    steps = (weight.double() / scale).numpy()
    distance = np.abs(steps[..., None] - levels).min(-1)
    found = (matrix.dequantize().double() / scale).numpy()
    np.testing.assert_allclose(np.abs(found - steps), distance, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e6])
def test_weights_outside_of_what_scales_reach_stay_finite(factor: float, weight: Tensor) -> None:
    """Scales are 2^-21 to 1,792: what is tinier than the least level becomes 0, what is larger the largest."""
    found = nearest(weight * factor).dequantize()
    assert found.isfinite().all()
    least, largest = 2.0**-21 * 1.125 * 2.0**-9, 1792 * LARGEST
    expected = (weight * factor).clamp(-largest, largest)
    assert float((found - expected).abs().max()) <= max(least / 2, 2.0**-4 * float(expected.abs().max()))


def test_scales_lose_less_than_those_that_cover(weight: Tensor) -> None:
    ours, usual = nearest(weight).dequantize(), usual_rounding(weight)
    assert (ours - weight).square().sum() < (usual - weight).square().sum()


@pytest.mark.parametrize("name", ["gptq", "fisher-gptq"])
def test_codes_lose_far_less_than_the_usual(name: str, weight: Tensor, moments: Tensor) -> None:
    (found,) = quantizer(name).quantize(weight[None], moments[None], [FP8])
    assert cost(found[FP8].round_trip(weight), weight, moments) < 0.6 * cost(usual_rounding(weight), weight, moments)
