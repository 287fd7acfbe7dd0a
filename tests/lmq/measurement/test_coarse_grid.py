import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.coarse_grid import (
    CoarseGrid,
    _levels,
    coarse_grid_warnings,
    find_coarse_grid,
    unfair_configurations,
)
from lmq.measurement.grids import fit_grids
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (96, 512)


def random_weight(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.03).to(dtype)


def gguf_weight(ggml_type: GgmlType) -> torch.Tensor:
    """A weight through gguf's own quantization and back, float32."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(random_weight().numpy(), ggml_type), ggml_type))


K_QUANT_SCALES = {
    GgmlType.Q2_K: (80, [1e-4, 3.7e-4]),
    GgmlType.Q3_K: (108, [1e-4]),
    GgmlType.Q4_K: (0, [1e-4, 3.7e-4]),
    GgmlType.Q5_K: (0, [1e-4, 3.7e-4]),
    GgmlType.Q6_K: (208, [1e-4]),
}
"""Offset of the float16 scales (and minima) in a block of 256 weights, and a value for each."""


def k_quant_weight(ggml_type: GgmlType) -> torch.Tensor:
    """A weight of random codes, gguf having no quantization to these types; float32."""
    start, scales = K_QUANT_SCALES[ggml_type]
    block_bytes = gguf.GGML_QUANT_SIZES[ggml_type][1]
    data = np.random.default_rng(3).integers(0, 256, (SHAPE[0] * SHAPE[1] // 256, block_bytes), dtype=np.uint8)
    data[:, start : start + 2 * len(scales)] = np.array(scales, dtype=np.float16).view(np.uint8)
    return torch.from_numpy(gguf.dequantize(data.reshape(SHAPE[0], -1), ggml_type))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ggml_type", "bits"), [(GgmlType.Q4_0, 4), (GgmlType.Q4_1, 4)])
def test_four_bit_gguf_weights_are_found_whatever_they_are_stored_in(
    ggml_type: GgmlType, bits: int, dtype: torch.dtype
) -> None:
    assert find_coarse_grid(gguf_weight(ggml_type).to(dtype)) == CoarseGrid(bits, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("ggml_type", "bits"), [(GgmlType.Q5_0, 5), (GgmlType.Q5_1, 5), (GgmlType.Q8_0, 8)])
def test_gguf_weights_of_more_bits_are_found(ggml_type: GgmlType, bits: int, dtype: torch.dtype) -> None:
    assert find_coarse_grid(gguf_weight(ggml_type).to(dtype)) == CoarseGrid(bits, 32)


@pytest.mark.parametrize(
    ("ggml_type", "bits", "group_size"),
    [
        (GgmlType.Q2_K, 2, 16),
        (GgmlType.Q3_K, 3, 16),
        (GgmlType.Q4_K, 4, 32),
        (GgmlType.Q5_K, 5, 32),
        (GgmlType.Q6_K, 6, 16),
    ],
)
def test_k_quants_are_found_by_the_groups_that_share_a_scale(ggml_type: GgmlType, bits: int, group_size: int) -> None:
    assert find_coarse_grid(k_quant_weight(ggml_type)) == CoarseGrid(bits, group_size)


@pytest.mark.parametrize("spec", [QuantSpec(2, 16), QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(8, 256)], ids=str)
def test_weights_of_our_own_grids_are_found(spec: QuantSpec) -> None:
    weight = random_weight()
    quantized = fit_grids(weight, [spec], quantizer("rtn"))[spec].round_trip(weight)
    assert find_coarse_grid(quantized) == CoarseGrid(spec.bits, spec.group_size)


def test_a_type_is_recognised_when_its_values_are_held_in_a_wider_one() -> None:
    stored = gguf_weight(GgmlType.Q4_1).to(torch.bfloat16)
    assert find_coarse_grid(stored.to(torch.float32)) == CoarseGrid(4, 32)


def test_ternary_weights_and_groups_of_zeros_are_on_a_grid() -> None:
    ternary = torch.randint(-1, 2, SHAPE, generator=torch.Generator().manual_seed(1)) * 0.07
    ternary[5] = 0
    assert find_coarse_grid(ternary) == CoarseGrid(2, 256)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("seed", range(5))
def test_ordinary_weights_lie_on_no_grid(dtype: torch.dtype, seed: int) -> None:
    assert find_coarse_grid(random_weight(dtype, seed)) is None


def test_a_grid_along_out_features_or_with_changed_weights_is_not_one() -> None:
    quantized = gguf_weight(GgmlType.Q4_1)
    assert find_coarse_grid(quantized.t()) is None
    assert find_coarse_grid(quantized + 1e-4 * random_weight(seed=9)) is None


@pytest.mark.parametrize("seed", range(12))
def test_the_fewest_levels_are_those_of_trying_one_number_after_another(seed: int) -> None:
    """Groups on grids of different numbers of levels, so that some are placed long before others."""
    generator = torch.Generator().manual_seed(seed)
    most = torch.randint(1, 200, (600, 1), generator=generator)
    codes = (torch.rand(600, 32, generator=generator) * (most + 1)).floor()
    codes[:, 0], codes[:, 1] = 0, most[:, 0]
    values = codes * torch.rand(600, 1, generator=generator) - 1
    fewest = [_fewest_steps(group) for group in values]
    assert None not in fewest
    assert _levels(values) == max(fewest) + 1
    moved = values[seed * 50]
    moved[7] += 0.3 / most[seed * 50, 0] * (moved[1] - moved[0])
    found = _fewest_steps(moved)
    assert _levels(values) == (None if found is None else max(*fewest, found) + 1)


def _fewest_steps(group: torch.Tensor) -> int | None:
    group, eps = group.double(), torch.finfo(torch.float32).eps
    low, spread = group.min(), group.max() - group.min()
    for steps in range(1, 256):
        places = (group - low) / spread * steps
        if (places - places.round()).abs().max() <= 2 * eps * group.abs().max() * steps / spread:
            return steps
    return None


def test_groups_that_would_straddle_rows_are_not_looked_for() -> None:
    quantized = gguf_weight(GgmlType.Q4_1)
    assert find_coarse_grid(quantized[:, :96]) == CoarseGrid(4, 32)
    assert find_coarse_grid(quantized[:, :40]) is None


def test_unfair_configurations_contain_the_grid() -> None:
    assert unfair_configurations(CoarseGrid(4, 32), STOPS) == [QuantSpec(4, 32), QuantSpec(8, 32)]
    assert unfair_configurations(CoarseGrid(4, 64), STOPS) == [QuantSpec(b, g) for b in (4, 8) for g in (64, 32)]
    assert unfair_configurations(CoarseGrid(6, 16), [QuantSpec(8, 16), *STOPS]) == [QuantSpec(8, 16)]
    assert unfair_configurations(CoarseGrid(8, 32), STOPS) == [QuantSpec(8, 32)]
    assert unfair_configurations(CoarseGrid(4, 32), STOPS, axis=0) == []
    assert unfair_configurations(None, STOPS) == []
    assert unfair_configurations(CoarseGrid(4, 32), [QuantSpec.parse("fp8")]) == []


def test_warnings_count_the_matrices_and_name_what_is_unfair_to_them() -> None:
    modules = [ModuleId(layer, "mlp.up_proj") for layer in range(4)]
    found = dict(zip(modules, [CoarseGrid(4, 32), None, CoarseGrid(4, 32), CoarseGrid(8, 32)], strict=True))
    first, second = coarse_grid_warnings(found, STOPS)
    assert first.startswith("2 of 4 matrices already lie on a grid of 4 bits in groups of 32")
    assert "b4g32, b8g32 can rebuild them" in first
    assert "1 of 4 matrices already lie on a grid of 8 bits" in second
    assert ": b8g32 can rebuild them" in second


def test_nothing_is_warned_of_where_no_configuration_is_unfair() -> None:
    found = {ModuleId(0, "mlp.up_proj"): CoarseGrid(4, 32)}
    assert coarse_grid_warnings(found, [QuantSpec(3, 32), QuantSpec(4, 64)]) == []
    assert coarse_grid_warnings(found, STOPS, axis=0) == []
    assert coarse_grid_warnings({ModuleId(0, "mlp.up_proj"): None}, STOPS) == []
