import pytest
import scipy.stats
import torch

from lmq.errors import InputError, NotFiniteError
from lmq.measurement.kurtosis import kurtosis


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_equals_scipy(dtype: torch.dtype, mean: float) -> None:
    weight = (torch.randn(517, 333, generator=torch.Generator().manual_seed(1)) * 0.02 + mean).to(dtype)
    expected = scipy.stats.kurtosis(weight.double().numpy().ravel(), fisher=False, bias=True)
    assert kurtosis(weight) == pytest.approx(expected, rel=1e-9)


def test_one_outlier_and_a_transposed_view_equal_scipy() -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    weight[3, 5] = 1e4
    expected = scipy.stats.kurtosis(weight.double().numpy().ravel(), fisher=False, bias=True)
    assert kurtosis(weight) == pytest.approx(expected, rel=1e-9)
    assert kurtosis(weight.t()) == pytest.approx(expected, rel=1e-9)


def test_normal_weights_have_kurtosis_three() -> None:
    assert kurtosis(torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3))) == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-20])
def test_constant_weight_is_refused_by_name(value: float) -> None:
    with pytest.raises(InputError, match=r"layer 3 mlp.up_proj has no kurtosis"):
        kurtosis(torch.full((300, 500), value), "layer 3 mlp.up_proj")


def test_not_finite_weight_is_refused_with_the_count() -> None:
    weight = torch.zeros(100, 100)
    weight[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(NotFiniteError, match=r"layer 0 x holds 3 elements of 10,000"):
        kurtosis(weight, "layer 0 x")
