import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError
from lmq.formats.groups import Grid, encode, from_groups, nearest_codes, to_groups
from lmq.formats.spec import ALLOWED_BITS, ALLOWED_GROUP_SIZES, STOPS, QuantSpec
from lmq.quantizers import quantizer


def _grid(weight: torch.Tensor, spec: QuantSpec, axis: int = 1, name: str = "hqq") -> Grid:
    return encode(weight, *quantizer(name, axis=axis).fit(weight, spec), spec, axis)


def _normal(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def _heavy(*shape: int) -> torch.Tensor:
    torch.manual_seed(6)
    return torch.distributions.StudentT(2.5).sample(shape) * 0.02


def _error(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    return float((weight.double() - quantized.double()).norm())


def _unstored_error(weight: torch.Tensor, spec: QuantSpec, axis: int) -> float:
    """Error of the fitted grid with float scales and zeros."""
    scale, zero = quantizer("hqq", axis=axis).fit(weight, spec)
    codes = nearest_codes(to_groups(weight, spec.group_size, axis), scale, zero, spec.bits)
    quantized = (codes - zero[:, None]) * scale[:, None]
    return _error(weight, from_groups(quantized, (weight.shape[0], weight.shape[1]), axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_are_those_of_the_documented_reshape(axis: int) -> None:
    weight = torch.arange(6 * 48.0).view(6, 48)
    groups = to_groups(weight, 32, axis)
    assert groups.shape == (9, 32)
    assert groups[1].tolist() == (weight.reshape(-1, 32)[1] if axis == 1 else weight.reshape(32, -1)[:, 1]).tolist()
    assert torch.equal(from_groups(groups, (6, 48), axis), weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_round_trip_is_what_its_codes_stand_for(dtype: torch.dtype, axis: int) -> None:
    weight = _normal(64, 576).to(dtype)
    before = weight.clone()
    for spec in STOPS:
        grid = _grid(weight, spec, axis)
        assert torch.equal(grid.round_trip(weight), grid.dequantize(grid.codes(weight)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "spec", [*STOPS, QuantSpec(4, 16, meta_group_size=7), QuantSpec(5, 64), QuantSpec(6, 256)], ids=str
)
def test_stored_tensors_take_the_bytes_of_the_configuration(spec: QuantSpec, axis: int) -> None:
    weight = _normal(96, 192)
    grid = _grid(weight, spec, axis)
    metadata_bytes = sum(tensor.numel() * tensor.element_size() for tensor in grid.to_tensors().values())
    assert metadata_bytes + weight.numel() * spec.bits // 8 == spec.size_bytes(weight.numel()) == grid.size_bytes
    copy = Grid.from_tensors(grid.to_tensors(), spec, grid.shape, axis)
    assert torch.equal(copy.round_trip(weight), grid.round_trip(weight))


@pytest.mark.parametrize("axis", [0, 1])
def test_decode_follows_the_documented_format(axis: int) -> None:
    """In float64, group by group."""
    grid = _grid(_heavy(48, 128), QuantSpec(3, 32, meta_group_size=50), axis)
    scale, zero = grid.decode()
    unit, zero_low, zero_high = grid.matrix_range.double().tolist()
    for group in range(len(scale)):
        low, high = grid.scale_ranges[group // 50].double().tolist()
        code, zero_code = int(grid.scale_codes[group]), int(grid.zero_codes[group])
        assert float(scale[group]) == pytest.approx(unit * low * (high / low) ** ((code - 1) / 254), rel=1e-5)
        assert float(zero[group]) == pytest.approx(zero_low + zero_code * (zero_high - zero_low) / 255, abs=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_and_weights_follow_the_formula(axis: int) -> None:
    weight, spec = _heavy(32, 64), QuantSpec(4, 64)
    grid = _grid(weight, spec, axis)
    codes, (scale, zero) = grid.codes(weight), grid.decode()
    assert codes.dtype == torch.uint8
    assert codes.shape == (32, 64)
    values = torch.arange(16.0)
    for group, row in enumerate(to_groups(weight, 64, axis)):
        candidates = (values - zero[group]) * scale[group]
        nearest = (row[:, None] - candidates).abs().amin(1)
        assert torch.allclose((row - candidates[codes[group].long()]).abs(), nearest, atol=1e-7)
    quantized = (codes.float() - zero[:, None]) * scale[:, None]
    assert torch.equal(grid.dequantize(codes), from_groups(quantized, (32, 64), axis))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight", [_normal(256, 512), _heavy(256, 512)], ids=["normal", "heavy tails"])
def test_storing_scales_and_zeros_in_8_bits_costs_little(weight: torch.Tensor, axis: int) -> None:
    limits = {2: 0.005, 3: 0.005, 4: 0.01, 8: 0.15}
    for spec in STOPS:
        stored = _error(weight, _grid(weight, spec, axis).round_trip(weight))
        assert stored <= _unstored_error(weight, spec, axis) * (1 + limits[spec.bits]), spec


def test_one_huge_weight_does_not_ruin_the_other_groups() -> None:
    weight = _normal(256, 512)
    weight[3, 5] = 1e3
    without = torch.ones_like(weight, dtype=torch.bool)
    without[3] = False
    spec = QuantSpec(4, 64)
    plain = _error(_normal(256, 512)[without], _grid(_normal(256, 512), spec).round_trip(_normal(256, 512))[without])
    assert _error(weight[without], _grid(weight, spec).round_trip(weight)[without]) < 1.1 * plain


def test_rows_eight_orders_of_magnitude_apart_keep_their_relative_error() -> None:
    weight = _normal(256, 512) * torch.logspace(-4, 4, 256)[:, None]
    spec = QuantSpec(4, 64)
    quantized = _grid(weight, spec).round_trip(weight)
    relative = (quantized - weight).norm(dim=1) / weight.norm(dim=1)
    assert relative.max() < 0.15


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_constant_groups(bits: int) -> None:
    weight = _normal(64, 128)
    weight[3], weight[7], weight[9], weight[11] = 0, 0.5, -0.5, 1e-6
    quantized = _grid(weight, QuantSpec(bits, 64)).round_trip(weight)
    assert torch.equal(quantized[3], torch.zeros(128))
    assert torch.allclose(quantized[7], weight[7], rtol=0.01)
    assert torch.allclose(quantized[9], weight[9], rtol=0.01)
    assert torch.allclose(quantized[11], weight[11], rtol=0.1)


@pytest.mark.parametrize("value", [0.0, -0.37, 1e-20, 1e20])
def test_constant_matrices(value: float) -> None:
    weight = torch.full((64, 128), value)
    for spec in STOPS:
        assert torch.allclose(_grid(weight, spec).round_trip(weight), weight, rtol=1e-3, atol=0), spec


def test_rows_far_from_zero_are_kept_within_a_step_of_their_size() -> None:
    weight = _normal(64, 128)
    weight[7] += 10
    quantized = _grid(weight, QuantSpec(4, 64)).round_trip(weight)
    assert (quantized[7] - weight[7]).abs().max() < 0.3
    others = torch.arange(64) != 7
    assert _error(weight[others], quantized[others]) < 1.1 * _unstored_error(_normal(64, 128), QuantSpec(4, 64), 1)


@given(
    rows=st.integers(1, 9),
    spec=st.builds(QuantSpec, st.sampled_from(ALLOWED_BITS), st.sampled_from(ALLOWED_GROUP_SIZES)),
    axis=st.sampled_from([0, 1]),
    size=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**31),
)
def test_any_matrix_that_divides_is_quantized_within_its_spread(
    rows: int, spec: QuantSpec, axis: int, size: float, seed: int
) -> None:
    weight = torch.randn(rows, 3 * spec.group_size, generator=torch.Generator().manual_seed(seed)) * size
    grid = _grid(weight, spec, axis, "rtn")
    spread = float(weight.max() - weight.min())
    quantized = grid.round_trip(weight)
    assert bool(torch.isfinite(quantized).all())
    assert float((quantized - weight).abs().max()) <= 0.6 * spread / (2**spec.bits - 1) + 0.02 * spread
    assert int(grid.codes(weight).max()) < 2**spec.bits


def test_half_precision_and_transposed_weights_are_read_as_they_are() -> None:
    spec = QuantSpec(4, 64)
    for weight in (_normal(64, 128).to(torch.bfloat16), _normal(128, 64).t()):
        kept = weight.clone()
        dense = weight.float().contiguous()
        assert torch.equal(_grid(weight, spec).round_trip(weight), _grid(dense, spec).round_trip(dense))
        assert torch.equal(weight, kept)


def test_tensors_that_do_not_fit_are_refused() -> None:
    grid = _grid(_normal(64, 128), QuantSpec(4, 64))
    tensors = grid.to_tensors()
    with pytest.raises(InputError, match=r"scale_codes of a b4g32 grid for \[64, 128\] must be torch.uint8 \[256\]"):
        Grid.from_tensors(tensors, QuantSpec(4, 32), (64, 128), 1)
    with pytest.raises(InputError, match=r"scale_ranges .* not torch.float32"):
        Grid.from_tensors({**tensors, "scale_ranges": tensors["scale_ranges"].float()}, grid.spec, grid.shape, 1)
    with pytest.raises(InputError, match="axis = 3"):
        Grid.from_tensors(tensors, grid.spec, grid.shape, 3)
