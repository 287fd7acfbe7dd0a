from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmq.errors import InputError
from lmq.formats.groups import nearest_codes, to_groups
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.frobenius import frobenius_errors
from lmq.measurement.grids import fit_grids
from lmq.quantizers import quantizer
from lmq.quantizers.integer_zeros import refit_scale, whole_zeros

FITTERS: list[dict[str, Any]] = [{"name": "hqq"}, {"name": "rtn"}, {"name": "hqq", "axis": 0}]


def _weight(seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 0.05 + shift


def _plain_grid(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> list[tuple[float, float]]:
    """One group at a time, in float64."""
    grids = []
    for row, (step, middle) in enumerate(zip(scale.tolist(), zero.tolist(), strict=True)):
        top, weights = 2**bits - 1, groups[row].double().tolist()
        low, high = min(*weights, 0.0), max(*weights, 0.0)
        nearest = 128 if bits == 8 else min(max(round(middle), 0), top)
        if abs(nearest - middle) <= 0.5 and step * top <= 2 * (high - low):
            grids.append((step, nearest))
        elif bits == 8:
            grids.append((max(high / 127, -low / 128), 128))
        else:
            step = (high - low) / top
            grids.append((step, round(-low / step) if step else 0))
    return grids


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    shift=st.floats(-1, 1),
    size=st.floats(1e-4, 10),
    zero=st.floats(-20, 270),
    scale=st.floats(1e-3, 1),
    seed=st.integers(0, 100),
)
def test_zeros_are_whole_and_grids_those_of_a_plain_loop(
    bits: int, shift: float, size: float, zero: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = (torch.randn(5, 32, generator=generator) + shift) * size
    zeros = torch.full((5,), zero) + torch.randn(5, generator=generator)
    scales, wholes = whole_zeros(groups, torch.full((5,), scale), zeros, bits)
    expected = _plain_grid(groups, torch.full((5,), scale), zeros, bits)
    assert torch.allclose(scales, torch.tensor([step for step, _ in expected]), rtol=1e-5)
    assert (wholes - torch.tensor([float(whole) for _, whole in expected])).abs().max() <= (bits != 8)  # ties
    assert torch.equal(wholes, wholes.round())
    assert 0 <= wholes.min() <= wholes.max() <= 2**bits - 1


def test_a_group_off_zero_gets_a_grid_that_covers_it_and_zero() -> None:
    groups = torch.stack([torch.linspace(2.0, 2.1, 32), torch.linspace(-5.0, -4.0, 32), torch.zeros(32)])
    scale, zero = whole_zeros(groups, torch.full((3,), 0.01), torch.tensor([-200.0, 500.0, 3.0]), 4)
    assert torch.allclose(scale, torch.tensor([2.1 / 15, 5.0 / 15, 0.0]))
    assert zero.tolist() == [0, 15, 0]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_refitted_scale_has_less_error(bits: int) -> None:
    groups = to_groups(_weight(1), 64, 1)
    scale, zero = whole_zeros(groups, *quantizer("hqq").fit(_weight(1), QuantSpec(bits, 64)), bits)
    refitted = refit_scale(groups, scale, zero, bits)

    def error(scale: torch.Tensor) -> float:
        quantized = (nearest_codes(groups, scale, zero, bits) - zero[:, None]) * scale[:, None]
        return float((quantized - groups).norm())

    assert error(refitted) < error(scale)


@pytest.mark.parametrize("options", FITTERS, ids=str)
@pytest.mark.parametrize("spec", STOPS, ids=str)
def test_stored_zeros_are_whole_to_the_bit(spec: QuantSpec, options: dict[str, Any]) -> None:
    weight = torch.cat([_weight(2), _weight(3, shift=1.0), torch.zeros(8, 256)])
    grid = fit_grids(weight, [spec], quantizer(**options, integer_zeros=True))[spec]
    scale, zero = grid.decode()
    used = zero[scale > 0]
    assert torch.equal(used, used.round())
    assert 0 <= used.min() <= used.max() <= 2**spec.bits - 1
    assert spec.bits != 8 or used.unique().tolist() == [128]
    assert (grid.round_trip(weight)[-8:] == 0).all()


def test_whole_zeros_cost_little_where_real_ones_are_not_far() -> None:
    for spec, most in ((QuantSpec(4, 64), 1.15), (QuantSpec(4, 128), 1.12), (QuantSpec(8, 64), 1.25)):
        grids = [fit_grids(_weight(4), [spec], quantizer("hqq", integer_zeros=whole))[spec] for whole in (False, True)]
        real, whole = frobenius_errors(_weight(4), grids)
        assert real < whole < most * real, spec


@pytest.mark.parametrize("options", FITTERS, ids=str)
@pytest.mark.parametrize("spec", STOPS, ids=str)
def test_symmetric_grids_have_the_middle_and_less_error_than_the_largest_weight_gives(
    spec: QuantSpec, options: dict[str, Any]
) -> None:
    """The reference scales every group by its largest weight, as symmetric quantization is commonly done."""
    weight, middle = _weight(5), 2 ** (spec.bits - 1)
    grid = fit_grids(weight, [spec], quantizer(**options, integer_zeros="middle"))[spec]
    assert grid.decode()[1].unique().tolist() == [middle]
    groups = weight.view(-1, spec.group_size)
    scale = groups.abs().amax(1, keepdim=True) / (middle - 1 if spec.bits > 2 else middle)
    common = (groups / scale).round().clamp(-middle, middle - 1) * scale
    assert (grid.round_trip(weight) - weight).norm() < 1.01 * (common.view(weight.shape) - weight).norm()


@pytest.mark.parametrize("name", ["rtn", "hqq", "weighted", "gptq", "fisher-gptq"])
def test_other_zeros_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"integer_zeros = 'centre' is not allowed; allowed: false, true, middle"):
        quantizer(name, integer_zeros="centre")


def test_the_hqq_package_fits_real_zeros_only() -> None:
    assert not quantizer("hqq-package").integer_zeros
    with pytest.raises(InputError, match="does not take these options"):
        quantizer("hqq-package", integer_zeros=True)
