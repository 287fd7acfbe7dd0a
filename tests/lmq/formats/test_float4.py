"""4-bit floats against the compressed-tensors package, which packs, decompresses and rounds on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmq.allocation.targets import TARGETS
from lmq.formats.float4 import float4_tensors, largest_scale
from lmq.formats.gguf_types import GGUF_TYPES
from lmq.formats.spec import QuantSpec
from lmq.quantizers import quantizer
from lmq.quantizers.gguf_fit import nearest_matrix
from tests.lmq.random_matrices import correlated_moments, rows_of_different_spread

compressors = pytest.importorskip("compressed_tensors.compressors", reason="pip install 'lmq[vllm]'")
quantization = pytest.importorskip("compressed_tensors.quantization")
calibration = pytest.importorskip("compressed_tensors.quantization.utils")
lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")

ROWS, COLUMNS = 24, 256
NAMES = ("mxfp4", "nvfp4")


def scheme_of(name: str) -> Any:
    """The package's own scheme for weights alone."""
    return quantization.preset_name_to_scheme(f"{name.upper()}A16", ["Linear"])


def decompressed(tensors: dict[str, Tensor], name: str) -> Tensor:
    compressor = compressors.BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    return compressor.decompress(dict(tensors), scheme_of(name))["weight"].float()


def own_rounding(weight: Tensor, name: str) -> Tensor:
    """The package's own: scales that cover every group, nearest codes."""
    args = scheme_of(name).weights
    groups = weight.unflatten(1, (-1, args.group_size))
    low, high = groups.amin(2), groups.amax(2)
    global_scale = calibration.generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    scale, zero = calibration.calculate_qparams(low, high, args, global_scale=global_scale)
    return lifecycle.fake_quantize(weight, scale, zero, args, global_scale=global_scale)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return rows_of_different_spread(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def moments() -> Tensor:
    return correlated_moments(COLUMNS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0])
def test_the_package_decompresses_the_very_weights(name: str, factor: float, weight: Tensor) -> None:
    matrix = nearest_matrix(weight * factor, torch.ones(COLUMNS), GGUF_TYPES[name])
    tensors, written = float4_tensors(matrix, largest_scale(matrix))
    assert torch.equal(written, matrix.dequantize())
    assert torch.equal(decompressed(tensors, name), matrix.dequantize())
    assert tensors["weight_packed"].shape == (ROWS, COLUMNS // 2)
    shape, dtype = ((ROWS, 8), torch.uint8) if name == "mxfp4" else ((ROWS, 16), torch.float8_e4m3fn)
    assert (tensors["weight_scale"].shape, tensors["weight_scale"].dtype) == (shape, dtype)
    global_bytes = 4 if name == "nvfp4" else 0
    stored_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (
        stored_bytes
        == matrix.size_bytes + global_bytes
        == TARGETS["vllm"].size_bytes(QuantSpec.parse(name), ROWS, COLUMNS)
    )


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_packed_as_the_package_packs_them(name: str, weight: Tensor) -> None:
    matrix = nearest_matrix(weight, torch.ones(COLUMNS), GGUF_TYPES[name])
    tensors, _ = float4_tensors(matrix, largest_scale(matrix))
    state = {**tensors, "weight": matrix.dequantize(), "weight_scale": tensors["weight_scale"].float()}
    del state["weight_packed"]
    if name == "mxfp4":
        state["weight_scale"] = torch.exp2(tensors["weight_scale"].double() - 127).float()
    compressor = compressors.BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    compressed = compressor.compress(state, scheme_of(name))
    assert torch.equal(compressed["weight_packed"], tensors["weight_packed"])
    assert torch.equal(compressed["weight_scale"].view(torch.uint8), tensors["weight_scale"].view(torch.uint8))


def test_matrices_that_are_joined_share_a_scale_and_keep_their_weights(weight: Tensor) -> None:
    matrices = [nearest_matrix(weight * factor, torch.ones(COLUMNS), GGUF_TYPES["nvfp4"]) for factor in (1.0, 0.1)]
    largest = max(map(largest_scale, matrices))
    stored = [float4_tensors(matrix, largest)[0] for matrix in matrices]
    assert torch.equal(stored[0]["weight_global_scale"], stored[1]["weight_global_scale"])
    for matrix, tensors in zip(matrices, stored, strict=True):
        assert torch.equal(decompressed(tensors, "nvfp4"), matrix.dequantize())


def test_scales_far_below_the_largest_are_rounded_and_it_is_told(weight: Tensor) -> None:
    matrix = nearest_matrix(weight, torch.ones(COLUMNS), GGUF_TYPES["nvfp4"])
    tensors, written = float4_tensors(matrix, largest_scale(matrix) * 2**15)
    assert not torch.equal(written, matrix.dequantize())
    assert torch.equal(decompressed(tensors, "nvfp4"), written)


def test_scales_of_a_matrix_are_within_what_e4m3_holds() -> None:
    """Though its groups are further apart: the smallest normal value of E4M3 is 2^-6."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -9, 8)[:, None]
    weight[3] = 0
    matrix = nearest_matrix(weight, torch.ones(64), GGUF_TYPES["nvfp4"])
    tensors, written = float4_tensors(matrix, largest_scale(matrix))
    assert float(tensors["weight_scale"].float().min()) >= 2**-6
    assert torch.equal(written, matrix.dequantize())
    assert (written[3] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_codes_lose_far_less_than_those_of_the_package(name: str, weight: Tensor, moments: Tensor) -> None:
    def cost(quantized: Tensor) -> float:
        error = (quantized - weight).double()
        return float((error @ moments.double() * error).sum())

    (found,) = quantizer("gptq").quantize(weight[None], moments[None], [QuantSpec.parse(name)])
    assert cost(found[QuantSpec.parse(name)].round_trip(weight)) < 0.6 * cost(own_rounding(weight, name))


@pytest.mark.parametrize("name", NAMES)
def test_scales_lose_no_more_than_those_of_the_package(name: str, weight: Tensor) -> None:
    nearest = nearest_matrix(weight, torch.ones(COLUMNS), GGUF_TYPES[name]).dequantize()
    assert (nearest - weight).square().sum() < (own_rounding(weight, name) - weight).square().sum()
