"""Codes, scales and zeros found by coordinate descent, against float64 loops that try everything that can be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import encode, from_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers import quantizer
from lmq.quantizers.coordinate_descent import descend
from lmq.quantizers.error_feedback import damped_moments, feedback_of, round_with_feedback


def _weight(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def _moments(in_features: int, tokens: int = 400, seed: int = 2) -> Tensor:
    """H of correlated inputs whose sizes differ a hundredfold, damped."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5 + torch.eye(in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) @ mixing
    inputs *= torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]
    return damped_moments(inputs.t() @ inputs / tokens, 0.1)


def _start(weight: Tensor, spec: QuantSpec, moments: Tensor, *, axis: int = 1, whole_zeros: bool = False) -> CodedGrid:
    fitted = quantizer("rtn", axis=axis, integer_zeros=whole_zeros)
    grid = encode(weight, *fitted.fit(weight, spec), spec, axis, integer_zeros=whole_zeros)
    return round_with_feedback(weight[None], [grid], [feedback_of(moments, damping=1e-6)])[0]


def _cost(weight: Tensor, grid: CodedGrid, moments: Tensor) -> float:
    error = (grid.round_trip(weight) - weight).double()
    return float(((error @ moments.double()) * error).sum())


def _codes(grid: CodedGrid, weight: Tensor) -> Tensor:
    return from_groups(grid.codes(weight), grid.shape, grid.axis).double()


def _by_weight(values: Tensor, grid: CodedGrid) -> Tensor:
    return from_groups(values.double()[:, None].expand(-1, grid.spec.group_size), grid.shape, grid.axis).clone()


def _row_costs(error: Tensor, moments: Tensor) -> Tensor:
    return ((error @ moments) * error).sum(1)


def _try_every_code(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, moments: Tensor, bits: int, column: int
) -> None:
    """Give the weights of a column the codes of least cost, all else as it is."""
    costs = []
    for code in range(2**bits):
        tried = codes.clone()
        tried[:, column] = code
        costs.append(_row_costs((tried - zero) * scale - weight, moments))
    codes[:, column] = torch.stack(costs).argmin(0).double()


@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 1), ((32, 12), 0)], ids=["straddling rows", "axis 0"])
def test_a_sweep_gives_every_column_its_best_codes(shape: tuple[int, int], axis: int) -> None:
    spec, weight, moments = QuantSpec(3, 16), _weight(shape), _moments(shape[1])
    start = _start(weight, spec, moments, axis=axis)
    scale, zero = (_by_weight(values, start) for values in start.decode())
    expected = _codes(start, weight)
    for column in range(shape[1]):
        _try_every_code(weight.double(), expected, scale, zero, moments.double(), 3, column)
    (found,) = descend(weight[None], [start], moments[None], sweeps=1)
    assert float((_codes(found, weight) == expected).double().mean()) > 0.99  # float32 breaks ties the other way
    assert torch.equal(found.scale_codes, start.scale_codes)
    assert _cost(weight, found, moments) < _cost(weight, start, moments)


def test_a_sweep_gives_every_group_its_best_scale_and_zero_that_can_be_stored() -> None:
    """All 255 scales with the zero that suits each, then all 256 zeros, then all codes column by column."""
    spec, weight, moments = QuantSpec(2, 16), _weight((5, 48)), _moments(48)
    start = _start(weight, spec, moments)
    levels, exact, target = start.levels(), moments.double(), weight.double()
    scale, zero = (_by_weight(values, start) for values in start.decode())
    codes = _codes(start, weight)
    for group in range(3):
        columns = slice(16 * group, 16 * (group + 1))
        for row in range(5):
            number = 3 * row + group
            one = slice(row, row + 1)

            def cost(s: float, z: float, one: slice = one, columns: slice = columns) -> float:
                error = (codes[one] - zero[one]) * scale[one] - target[one]
                error[:, columns] = (codes[one, columns] - z) * s - target[one, columns]
                return float(_row_costs(error, exact))

            tried = torch.arange(1, 256).float()
            ladder = (levels.unit * (levels.bottom[number] + (tried - 1) * levels.step[number]).exp()).double().tolist()
            judged = []
            for s in ladder:  # a parabola in the zero: its least value by three points
                at = [cost(s, z) for z in (0.0, 1.0, 2.0)]
                bend, slope = (at[0] - 2 * at[1] + at[2]) / 2, at[1] - at[0]
                judged.append(at[0] - (slope - bend) ** 2 / (4 * bend))
            best_scale = ladder[int(torch.tensor(judged).argmin())]
            zeros = (torch.arange(256).float() * levels.zero_step + levels.zero_low).double().tolist()
            best_zero = min(zeros, key=lambda z, s=best_scale: cost(s, z))
            scale[row, columns], zero[row, columns] = best_scale, best_zero
        for column in range(columns.start, columns.stop):
            _try_every_code(target, codes, scale, zero, exact, 2, column)
    (found,) = descend(weight[None], [start], moments[None], sweeps=1)
    found_scale, found_zero = (_by_weight(values, found) for values in found.decode())
    assert torch.allclose(found_scale, scale, rtol=1e-5)
    assert torch.allclose(found_zero, zero, atol=1e-5)
    assert float((_codes(found, weight) == codes).double().mean()) > 0.99
    assert not torch.equal(found.scale_codes, start.scale_codes)
    assert not torch.equal(found.zero_codes, start.zero_codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_sweep_lowers_the_cost(bits: int) -> None:
    weight, moments = _weight((48, 128)), _moments(128)
    start = _start(weight, QuantSpec(bits, 64), moments)
    costs = [
        _cost(weight, start if not sweeps else descend(weight[None], [start], moments[None], sweeps=sweeps)[0], moments)
        for sweeps in range(4)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < 0.97 * costs[0]


def test_matrices_together_come_out_as_each_alone() -> None:
    weights = torch.stack([_weight((24, 64), seed) for seed in range(3)])
    moments = torch.stack([_moments(64, seed=seed) for seed in range(3)])
    specs = [QuantSpec(3, 32), QuantSpec(2, 32), QuantSpec(4, 32)]
    starts = [_start(*each) for each in zip(weights, specs, moments, strict=True)]
    together = descend(weights, starts, moments, sweeps=2)
    for number, found in enumerate(together):
        one = slice(number, number + 1)
        (alone,) = descend(weights[one], starts[one], moments[one], sweeps=2)
        assert torch.equal(found.round_trip(weights[number]), alone.round_trip(weights[number]))


def test_whole_zeros_stay_where_they_are() -> None:
    weight, moments = _weight((24, 64)), _moments(64)
    start = _start(weight, QuantSpec(4, 32), moments, whole_zeros=True)
    (found,) = descend(weight[None], [start], moments[None], sweeps=2, tune_zeros=False)
    assert torch.equal(found.decode()[1], start.decode()[1])
    assert not torch.equal(found.scale_codes, start.scale_codes)
    assert _cost(weight, found, moments) < _cost(weight, start, moments)


def test_groups_of_zeros_and_of_equal_weights_are_kept() -> None:
    weight, moments = _weight((24, 64)), _moments(64)
    weight[3], weight[5] = 0, 0.02
    start = _start(weight, QuantSpec(3, 32), moments)
    (found,) = descend(weight[None], [start], moments[None], sweeps=2)
    rounded = found.round_trip(weight)
    assert not rounded[3].any()
    assert torch.allclose(rounded[5], weight[5], rtol=0.02)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_without_any_input_nothing_breaks(damping: float) -> None:
    """Undamped, H is 0 and nothing has a best value; damped, every weight counts alike."""
    weight, moments = _weight((24, 64)), damped_moments(torch.zeros(64, 64), damping)
    start = _start(weight, QuantSpec(3, 32), _moments(64))
    (found,) = descend(weight[None], [start], moments[None], sweeps=2)
    if damping:
        assert torch.equal(found.codes(weight), super(CodedGrid, found).codes(weight))
    else:
        assert torch.equal(found.round_trip(weight), start.round_trip(weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_descent_on_a_gpu() -> None:
    weight, moments = _weight((96, 128)), _moments(128)
    start = _start(weight, QuantSpec(3, 64), moments)
    (expected,) = descend(weight[None], [start], moments[None], sweeps=2)
    (found,) = descend(weight[None].cuda(), [start.to("cuda")], moments[None].cuda(), sweeps=2)
    assert _cost(weight, found.to("cpu"), moments) == pytest.approx(_cost(weight, expected, moments), rel=1e-3)
