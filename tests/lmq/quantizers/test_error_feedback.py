"""Codes found with error feedback, against float64 loops that follow other derivations of the same algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmq.formats.coded_grid import CodedGrid
from lmq.formats.groups import Grid, encode, from_groups, to_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers import error_feedback, quantizer
from lmq.quantizers.error_feedback import Feedback, feedback_of, round_with_feedback

SHAPES = [(48, 64), (40, 96), (24, 160)]
"""Groups of 64 fit the rows of the first, and straddle those of the others."""


def _weight(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def _moments(in_features: int, tokens: int, seed: int = 2) -> Tensor:
    """Of correlated inputs whose sizes differ a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5 + torch.eye(in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) @ mixing
    inputs *= torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]
    return inputs.t() @ inputs / tokens


def _grid(weight: Tensor, spec: QuantSpec, axis: int = 1) -> Grid:
    return encode(weight, *quantizer("hqq", axis=axis).fit(weight, spec), spec, axis)


def _by_weight(grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero of every weight, float64 [out_features, in_features] each."""
    group_size = grid.spec.group_size
    scale, zero = (values.double()[:, None].expand(-1, group_size) for values in grid.decode())
    return from_groups(scale, grid.shape, grid.axis), from_groups(zero, grid.shape, grid.axis)


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)


def by_elimination(weight: Tensor, grid: Grid, moments: Tensor, damping: float) -> Tensor:
    """Codes [out_features, in_features] column by column: the optimal brain surgeon's update, without any Cholesky.

    With P the inverse of the damped H, column j's error spreads by row j of P; j is then eliminated from P.
    """
    scale, zero = _by_weight(grid)
    remaining, codes = weight.double().clone(), torch.empty(weight.shape, dtype=torch.float64)
    moments = moments.double()
    damped = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    for column in torch.argsort(moments.diagonal(), descending=True, stable=True).tolist():
        codes[:, column] = _nearest(remaining[:, column], scale[:, column], zero[:, column], grid.spec.bits)
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (remaining[:, column] - rounded) / inverse[column, column]
        remaining -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    return codes


def by_published_algorithm(weight: Tensor, grid: Grid, moments: Tensor, damping: float, block_size: int) -> Tensor:
    """Algorithm 1 of GPTQ (Frantar et al. 2023), line by line, on fixed grids and in the order of the matrix."""
    scale, zero = _by_weight(grid)
    moments = moments.double()
    columns = len(moments)
    damped = moments + damping * moments.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped)).t()  # H⁻¹ ← Cholesky(H⁻¹)ᵀ
    w, q = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(0, columns, block_size):
        last = min(i + block_size, columns)
        e = torch.zeros(len(w), block_size, dtype=torch.float64)
        for j in range(i, last):
            q[:, j] = _nearest(w[:, j], scale[:, j], zero[:, j], grid.spec.bits)
            e[:, j - i] = (w[:, j] - (q[:, j] - zero[:, j]) * scale[:, j]) / inverse[j, j]
            w[:, j:last] -= e[:, j - i, None] * inverse[j, j:last]
        w[:, last:] -= e[:, : last - i] @ inverse[i:last, last:]
    return q


def _codes(coded: CodedGrid, weight: Tensor) -> Tensor:
    return from_groups(coded.codes(weight), coded.shape, coded.axis).double()


def _cost(weight: Tensor, grid: Grid, codes: Tensor, moments: Tensor) -> float:
    scale, zero = _by_weight(grid)
    error = (codes - zero) * scale - weight.double()
    return float(((error @ moments.double()) * error).sum())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_eliminating_column_by_column(shape: tuple[int, int], bits: int, axis: int) -> None:
    weight, moments = _weight(shape), _moments(shape[1], 400)
    grid = _grid(weight, QuantSpec(bits, 64), axis)
    (coded,) = round_with_feedback(weight[None], [grid], [feedback_of(moments, damping=0.01)])
    found, expected = _codes(coded, weight), by_elimination(weight, grid, moments, 0.01)
    assert float((found == expected).double().mean()) > 0.999  # float32 breaks a tie the other way here and there
    assert _cost(weight, grid, found, moments) == pytest.approx(_cost(weight, grid, expected, moments), rel=1e-3)
    nearest = from_groups(grid.codes(weight), grid.shape, axis).double()
    assert _cost(weight, grid, found, moments) < 0.8 * _cost(weight, grid, nearest, moments)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_published_algorithm(shape: tuple[int, int], block_size: int) -> None:
    weight, moments = _weight(shape, seed=4), _moments(shape[1], 400, seed=5)
    grid = _grid(weight, QuantSpec(3, 32))
    feedback = feedback_of(moments, damping=0.01, order="stored")
    (coded,) = round_with_feedback(weight[None], [grid], [feedback])
    expected = by_published_algorithm(weight, grid, moments, 0.01, block_size)
    assert float((_codes(coded, weight) == expected).double().mean()) > 0.999


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("inputs", "tokens"), [(97, 300), (96, 20)], ids=["odd", "rank-deficient"])
def test_large_factors_are_made_in_place_and_are_the_same(
    inputs: int, tokens: int, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = _moments(inputs, tokens)
    moments[5] = moments[:, 5] = 0
    damping = 0.01 if double else 0.1
    if not double:
        monkeypatch.setattr(error_feedback, "_MOST_DOUBLE_INPUTS", 0)
    expected = feedback_of(moments, damping=damping)
    monkeypatch.setattr(error_feedback, "_MOST_COPIED_INPUTS", 0)
    monkeypatch.setattr(error_feedback, "_VALUES_AT_ONCE", 1000)
    monkeypatch.setattr(error_feedback, "_FACTORED_AT_ONCE", 16)
    found = feedback_of(moments, damping=damping)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.factor, expected.factor, rtol=1e-5 if double else 1e-3, atol=1e-4)
    ordered = (moments / moments.diagonal().mean())[found.order][:, found.order].double()
    ordered.diagonal().add_(damping + (ordered.diagonal() == 0))
    inverse = found.factor.double().t() @ found.factor.double()
    assert torch.allclose(inverse @ ordered, torch.eye(inputs, dtype=torch.float64), atol=1e-2)


def test_damping_is_raised_for_factors_made_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = _moments(96, 10)
    expected = feedback_of(moments, damping=0.0)
    monkeypatch.setattr(error_feedback, "_MOST_COPIED_INPUTS", 0)
    found = feedback_of(moments, damping=0.0)
    assert bool(found.factor.isfinite().all())
    torch.testing.assert_close(found.factor, expected.factor, rtol=1e-2, atol=1.0)


def test_matrices_together_are_rounded_as_each_alone() -> None:
    spec = QuantSpec(3, 64)
    weights = torch.stack([_weight((40, 96), seed) for seed in range(3)])
    grids = [_grid(weight, spec) for weight in weights]
    feedbacks = [feedback_of(_moments(96, 300, seed), damping=0.01) for seed in range(3)]
    together = round_with_feedback(weights, grids, feedbacks)
    for weight, grid, feedback, coded in zip(weights, grids, feedbacks, together, strict=True):
        (alone,) = round_with_feedback(weight[None], [grid], [feedback])
        assert torch.equal(alone.packed_codes, coded.packed_codes)


def test_inputs_that_are_never_used_are_rounded_to_nearest_and_change_no_other() -> None:
    weight, moments = _weight((40, 96)), _moments(96, 300)
    grid = _grid(weight, QuantSpec(4, 32))
    dead = torch.zeros(96, dtype=torch.bool)
    dead[[0, 17, 40, 95]] = True
    with_dead = moments.clone()
    with_dead[dead], with_dead[:, dead] = 0, 0
    (coded,) = round_with_feedback(weight[None], [grid], [feedback_of(with_dead, damping=0.01)])
    nearest = from_groups(grid.codes(weight), grid.shape, 1).double()
    assert torch.equal(_codes(coded, weight)[:, dead], nearest[:, dead])
    elsewhere = weight.clone()
    elsewhere[:, dead] = 0.3
    (other,) = round_with_feedback(elsewhere[None], [grid], [feedback_of(with_dead, damping=0.01)])
    assert torch.equal(_codes(coded, weight)[:, ~dead], _codes(other, weight)[:, ~dead])


def test_without_any_input_every_weight_is_rounded_to_nearest() -> None:
    weight = _weight((40, 96))
    grid = _grid(weight, QuantSpec(4, 32))
    (coded,) = round_with_feedback(weight[None], [grid], [feedback_of(torch.zeros(96, 96), damping=0.01)])
    assert torch.equal(coded.codes(weight), grid.codes(weight))


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
@pytest.mark.parametrize("tokens", [1, 5, 95])
def test_fewer_tokens_than_inputs_are_enough(tokens: int, damping: float) -> None:
    """H is singular, and with next to no damping not positive definite in floating point."""
    weight, moments = _weight((40, 96)), _moments(96, tokens)
    grid = _grid(weight, QuantSpec(4, 32))
    feedback = feedback_of(moments, damping=damping)
    assert bool(feedback.factor.isfinite().all())
    (coded,) = round_with_feedback(weight[None], [grid], [feedback])
    assert bool(coded.round_trip(weight).isfinite().all())
    if damping == 0.01:  # with less, what is fed back along directions that no token has may outgrow the grid
        nearest = from_groups(grid.codes(weight), grid.shape, 1).double()
        assert _cost(weight, grid, _codes(coded, weight), moments) < _cost(weight, grid, nearest, moments)


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_the_scale_of_the_moments_does_not_matter(scale: float) -> None:
    weight, moments = _weight((40, 96)), _moments(96, 300)
    grid = _grid(weight, QuantSpec(3, 32))
    plain, scaled = (
        round_with_feedback(weight[None], [grid], [feedback_of(factor * moments, damping=0.01)])[0]
        for factor in (1.0, scale)
    )
    assert float((plain.codes(weight) == scaled.codes(weight)).double().mean()) > 0.999


def test_the_factor_is_the_upper_cholesky_factor_of_the_damped_inverse() -> None:
    moments = _moments(64, 200)
    feedback: Feedback = feedback_of(moments, damping=0.05)
    ordered = moments.double()[feedback.order][:, feedback.order]
    damped = ordered + 0.05 * ordered.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True) * ordered.diagonal().mean().sqrt()
    assert torch.allclose(feedback.factor.double(), expected, rtol=1e-4, atol=1e-5)
    assert ordered.diagonal().tolist() == sorted(ordered.diagonal().tolist(), reverse=True)


def test_groups_of_zeros_stay_zeros() -> None:
    weight, moments = _weight((40, 96)), _moments(96, 300)
    weight[5] = 0
    grid = _grid(weight, QuantSpec(4, 32))
    (coded,) = round_with_feedback(weight[None], [grid], [feedback_of(moments, damping=0.01)])
    assert not coded.round_trip(weight)[5].any()
    assert bool(to_groups(coded.round_trip(weight), 32, 1).isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_on_a_gpu() -> None:
    weight, moments = _weight((96, 128)), _moments(128, 400)
    grid = _grid(weight, QuantSpec(3, 64))
    (expected,) = round_with_feedback(weight[None], [grid], [feedback_of(moments, damping=0.01)])
    on_gpu = feedback_of(moments.cuda(), damping=0.01)
    (found,) = round_with_feedback(weight[None].cuda(), [grid.to("cuda")], [on_gpu])
    assert float((found.codes(weight).cpu() == expected.codes(weight)).double().mean()) > 0.99
