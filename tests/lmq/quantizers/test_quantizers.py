import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.core.quantize import Quantizer as PackageQuantizer

from lmq.errors import InputError
from lmq.formats.groups import encode, nearest_codes, to_groups
from lmq.formats.spec import STOPS, QuantSpec
from lmq.quantizers import QUANTIZERS, CalibratedQuantizer, Quantizer, quantizer
from lmq.quantizers.rtn import min_max_grid


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give on small matrices, above all where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _student(shape: tuple[int, int], freedom: float, size: float) -> torch.Tensor:
    torch.manual_seed(11)
    return torch.distributions.StudentT(freedom).sample(shape) * size


def _normal(shape: tuple[int, int], size: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(12)) * size


WEIGHTS = {
    "square": _normal((576, 576), 0.05),
    "narrow heavy tails": _student((192, 576), 2.5, 0.03),
    "large outliers, where the shrink step acts": _student((256, 640), 2.1, 0.3),
    "small, where the limits of hqq just do not act": _normal((64, 128), 8e-3),
    "bfloat16": _normal((128, 256), 0.02).to(torch.bfloat16),
}


def _error(weight: torch.Tensor, fitted: tuple[torch.Tensor, torch.Tensor], spec: QuantSpec, axis: int) -> float:
    scale, zero = fitted
    groups = to_groups(weight.float(), spec.group_size, axis)
    quantized = (nearest_codes(groups, scale, zero, spec.bits) - zero[:, None]) * scale[:, None]
    return float((quantized - groups).double().norm())


def _package_error(weight: torch.Tensor, spec: QuantSpec, axis: int, *, optimize: bool = True) -> float:
    codes, meta = PackageQuantizer.quantize(
        weight.float(), spec.bits, group_size=spec.group_size, optimize=optimize, axis=axis, device="cpu", bitpack=False
    )
    meta["compute_dtype"] = torch.float32
    return float((PackageQuantizer.dequantize(codes, meta) - weight.float()).double().norm())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_hqq_has_the_errors_of_the_package(name: str, axis: int) -> None:
    weight = WEIGHTS[name]
    for spec in STOPS:
        ours = _error(weight, quantizer("hqq", axis=axis).fit(weight, spec), spec, axis)
        assert ours == pytest.approx(_package_error(weight, spec, axis), rel=1e-5), spec


@pytest.mark.parametrize("name", ["hqq", "rtn"])
@pytest.mark.parametrize("power", [-8, -14, -22, -60])
def test_small_weights_lose_no_more_than_large_ones(name: str, power: int) -> None:
    """hqq's limits on scales act below a spread of 1e-4, and of 0.013 at 8 bits; halving is exact in float32."""
    weight = _normal((64, 128), 0.02)
    for spec in STOPS:
        large = _error(weight, quantizer(name).fit(weight, spec), spec, 1)
        small_weight = weight * 2.0**power
        small = _error(small_weight, quantizer(name).fit(small_weight, spec), spec, 1)
        assert small * 2.0**-power == pytest.approx(large, rel=1e-5), spec


@pytest.mark.parametrize("deviation", [7e-5, 5e-5, 2e-5, 1e-5])
def test_small_weights_beat_the_package_where_its_limits_act(deviation: float) -> None:
    weight, spec = _normal((64, 128), deviation), QuantSpec(3, 64)
    assert _error(weight, quantizer("hqq").fit(weight, spec), spec, 1) < 0.95 * _package_error(weight, spec, 1)


@pytest.mark.parametrize("value", [0.0, -3e-3, 7.0])
def test_a_constant_group_costs_its_neighbours_nothing(value: float) -> None:
    """As stored: the grid of the matrix with a constant group against that without."""
    weight, spec = _normal((64, 128), 0.02), QuantSpec(3, 64)
    with_constant = torch.cat([weight, torch.full((1, 128), value)])
    grids = [encode(w, *quantizer("hqq").fit(w, spec), spec, 1) for w in (weight, with_constant)]
    alone, beside = (grid.round_trip(w) for grid, w in zip(grids, (weight, with_constant), strict=True))
    assert beside[-1] == pytest.approx(torch.full((128,), value), rel=0.02)
    assert (beside[:-1] - weight).norm() < 1.02 * (alone - weight).norm()


@pytest.mark.parametrize("axis", [0, 1])
def test_rtn_is_the_package_without_optimisation(axis: int) -> None:
    weight = WEIGHTS["narrow heavy tails"]
    for spec in STOPS:
        ours = _error(weight, quantizer("rtn", axis=axis).fit(weight, spec), spec, axis)
        assert ours == pytest.approx(_package_error(weight, spec, axis, optimize=False), rel=1e-7), spec


@pytest.mark.parametrize("axis", [0, 1])
def test_package_quantizer_has_the_errors_of_the_package(axis: int) -> None:
    weight, spec = WEIGHTS["square"], QuantSpec(4, 64)
    ours = _error(weight, quantizer("hqq-package", axis=axis).fit(weight, spec), spec, axis)
    assert ours == pytest.approx(_package_error(weight, spec, axis), rel=1e-7)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_hqq_default_is_the_package_with_its_own_default_configuration(name: str, axis: int) -> None:
    weight = WEIGHTS[name]
    for bits in (3, 4, 8):
        params = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)["weight_quant_params"]
        codes, meta = PackageQuantizer.quantize(weight.float(), device="cpu", bitpack=False, **params)
        meta["compute_dtype"] = torch.float32
        expected = float((PackageQuantizer.dequantize(codes, meta) - weight.float()).double().norm())
        fitted = quantizer("hqq-default", axis=axis).fit(weight, QuantSpec(bits, 64))
        assert _error(weight, fitted, QuantSpec(bits, 64), axis) == pytest.approx(expected, rel=1e-5)


def test_hqq_follows_its_formula_with_the_growing_beta_of_the_papers() -> None:
    """Against the definition in float64, every group shrunk, one matrix, no early stop reached."""
    weight, spec = WEIGHTS["large outliers, where the shrink step acts"], QuantSpec(3, 32)
    groups = weight.double().view(-1, spec.group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 7
    zero, beta = -low / scale, 10.0
    for _ in range(3):
        codes = (groups / scale + zero).round().clamp(0, 7)
        error = groups - (codes - zero) * scale
        kept = error.sign() * (error.abs() - error.abs() ** -0.3 / beta).clamp(min=0)
        zero = (codes - (groups - kept) / scale).mean(1, keepdim=True)
        beta *= 1.5
    fitted_scale, fitted_zero = quantizer("hqq", iterations=3, kappa=1.5).fit(weight, spec)
    assert torch.allclose(fitted_scale.double(), scale[:, 0], rtol=1e-6)
    assert (fitted_zero.double() - zero[:, 0]).abs().median() < 1e-5


@pytest.mark.parametrize("name", ["narrow heavy tails", "large outliers, where the shrink step acts"])
def test_hqq_leaves_settled_groups_without_changing_a_bit(name: str) -> None:
    """Against every group going through every iteration; both stop where the matrix's error no longer falls."""
    weight = WEIGHTS[name]
    for spec in STOPS:
        groups, top = to_groups(weight, spec.group_size, 1), 2**spec.bits - 1
        inverse_scale, zero = min_max_grid(groups, spec.bits)
        scaled, best = groups * inverse_scale[:, None], np.float32(np.inf)
        for _ in range(20):
            residual = (scaled + zero[:, None]).round().clamp(0, top) - scaled
            errors = -(residual - zero[:, None]) * (1 / inverse_scale)[:, None]
            sizes = errors.abs()
            kept = errors.sign() * (sizes - sizes**-0.3 / 10).clamp(min=0)
            next_zero = residual.mean(1) + kept.mean(1) * inverse_scale
            sums = (residual - zero[:, None]).abs().sum(1) * (1 / inverse_scale)
            error = np.float32(sums.sum(dtype=torch.float64).item() / weight.numel())
            zero = next_zero
            if not error < best:
                break
            best = error
        assert torch.equal(quantizer("hqq").fit(weight, spec)[1], zero), spec


def test_fit_leaves_the_weight_alone() -> None:
    weight = WEIGHTS["square"].clone()
    for fitter in (quantizer(name) for name in QUANTIZERS):
        if not isinstance(fitter, CalibratedQuantizer):
            fitter.fit(weight, QuantSpec(3, 64))
    assert torch.equal(weight, WEIGHTS["square"])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_description_is_json_with_every_option(name: str) -> None:
    fitted: Quantizer = quantizer(name, axis=0)
    description = json.loads(json.dumps(fitted.describe()))
    assert description["name"] == fitted.name == name
    assert description["axis"] == fitted.axis == 0


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(InputError, match="unknown quantizer 'hq'; did you mean 'hqq'"):
        quantizer("hq")
    with pytest.raises(InputError, match=r"does not take these options: .*'kapa'"):
        quantizer("hqq", kapa=1.01)
    with pytest.raises(InputError, match="kappa at least 1"):
        quantizer("hqq", kappa=0.5)
    with pytest.raises(InputError, match="lp_norm = 2"):
        quantizer("hqq", lp_norm=2)
    with pytest.raises(InputError, match="iterations = 0"):
        quantizer("hqq", iterations=0)
    with pytest.raises(InputError, match="axis = 2 is not a grouping axis; allowed: 0, 1"):
        quantizer("hqq", axis=2)
