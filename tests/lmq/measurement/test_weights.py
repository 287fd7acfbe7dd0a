from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError, NotFiniteError
from lmq.measurement.weights import (
    PERCENTILES,
    WEIGHT_STATISTICS_SCHEMA,
    kurtosis,
    magnitude_percentiles,
    scaled_profiles,
    weight_statistics,
)
from lmq.model.structure import ModuleId
from lmq.tables import read_rows, write_rows

MODULE = ModuleId(3, "mlp.up_proj")


def numpy_percentiles(weight: torch.Tensor) -> dict[str, float]:
    values = np.percentile(weight.double().abs().numpy().ravel(), list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (7, 13), (100, 101), (517, 333)])
def test_percentiles_are_those_of_numpy(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    kept = weight.clone()
    assert magnitude_percentiles(weight) == numpy_percentiles(weight)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(300, 300),
        torch.linspace(-1, 1, 90_000).view(300, 300),
        torch.distributions.StudentT(1.5).sample((700, 300)),
        torch.randn(400, 200).t(),
    ],
    ids=["constant", "sorted", "heavy tails", "transposed view"],
)
def test_percentiles_of_unusual_weights_are_those_of_numpy(weight: torch.Tensor) -> None:
    assert magnitude_percentiles(weight) == numpy_percentiles(weight)


def test_percentiles_are_exact_where_a_sample_of_the_weights_misses_the_tail() -> None:
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1)) * 1e-3
    weight.view(-1)[: 1 << 16 : 15] = 100.0  # every element that is looked at first, and no others
    assert magnitude_percentiles(weight) == numpy_percentiles(weight)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=300))
def test_percentiles_of_any_weight_are_those_of_numpy(values: list[float]) -> None:
    weight = torch.tensor([values])
    assert magnitude_percentiles(weight) == numpy_percentiles(weight)


def test_weights_without_percentiles_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"layer 0 q of shape \[0, 8\] has no elements"):
        magnitude_percentiles(torch.empty(0, 8), "layer 0 q")
    with pytest.raises(NotFiniteError, match="layer 0 q holds 1 elements of 2"):
        magnitude_percentiles(torch.tensor([[1.0, torch.nan]]), "layer 0 q")


def test_profiles_are_scaled_within_each_kind() -> None:
    profiles = {"q": {0: 3.0, 1: 5.0, 4: 4.0}, "down": {0: -10.0, 1: 30.0}, "same": {0: 2.0, 1: 2.0}}
    assert scaled_profiles(profiles) == {
        "q": {0: 0.0, 1: 1.0, 4: 0.5},
        "down": {0: 0.0, 1: 1.0},
        "same": {0: 0.0, 1: 0.0},
    }


def test_rows_hold_statistics_of_a_weight_and_the_grid_it_lies_on(tmp_path) -> None:
    generator = torch.Generator().manual_seed(5)
    free = torch.randn(64, 96, generator=generator)
    gridded = torch.randint(0, 16, (64, 96), generator=generator) * 0.01 - 0.05
    rows = [weight_statistics(MODULE, free), weight_statistics(MODULE, gridded)]
    write_rows(tmp_path / "w.parquet", WEIGHT_STATISTICS_SCHEMA, rows)
    assert read_rows(tmp_path / "w.parquet", WEIGHT_STATISTICS_SCHEMA) == rows
    assert rows[0] == {
        "layer": 3,
        "kind": "mlp.up_proj",
        "parameters": 64 * 96,
        "kurtosis": pytest.approx(scipy.stats.kurtosis(free.double().numpy().ravel(), fisher=False), rel=1e-9),
        **numpy_percentiles(free),
        "grid_bits": None,
        "grid_group_size": None,
    }
    assert (rows[1]["grid_bits"], rows[1]["grid_group_size"]) == (4, 32)


def test_a_row_names_the_weight_it_cannot_be_made_for() -> None:
    with pytest.raises(NotFiniteError, match=r"layer 3 mlp.up_proj holds 1,024 elements"):
        weight_statistics(MODULE, torch.full((32, 32), torch.nan))


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
def test_a_constant_weight_has_no_kurtosis_and_no_grid_and_is_named(
    value: float, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    row = weight_statistics(MODULE, torch.full((300, 512), value))
    assert (row["kurtosis"], row["grid_bits"], row["percentile_100"]) == (None, None, pytest.approx(abs(value)))
    assert "layer 3 mlp.up_proj has no kurtosis: its 153600 elements all equal" in caplog.text
    write_rows(tmp_path / "w.parquet", WEIGHT_STATISTICS_SCHEMA, [row])
    assert read_rows(tmp_path / "w.parquet", WEIGHT_STATISTICS_SCHEMA) == [row]


def test_what_has_no_number_is_scaled_to_nothing() -> None:
    found = scaled_profiles({"q": {0: 4.0, 1: None, 2: 3.0}, "dead": {0: None, 1: None}})
    assert found == {"q": {0: 1.0, 1: 0.0, 2: 0.0}, "dead": {0: 0.0, 1: 0.0}}


def test_not_finite_weight_is_refused_with_the_count() -> None:
    weight = torch.zeros(100, 100)
    weight[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(NotFiniteError, match=r"layer 0 x holds 3 elements of 10,000"):
        kurtosis(weight, "layer 0 x")
