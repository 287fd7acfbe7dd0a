import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats.mstats import trimmed_mean, trimmed_std

from lmq.errors import InputError
from lmq.model.structure import ModuleId
from lmq.outliers import (
    OUTLIERS_SCHEMA,
    find_outlier_layers,
    layer_z_scores,
    outlier_modules,
    outlier_rows,
    profiles_by_kind,
)
from lmq.tables import read_rows, write_rows

WAVE = [1 + 0.01 * (layer % 3) for layer in range(40)]


def _with(values: dict[int, float]) -> list[float]:
    return [values.get(layer, value) for layer, value in enumerate(WAVE)]


def _reference(profile: list[float], difference: str) -> list[int]:
    """Algorithm 1 as a loop."""
    pairs = list(itertools.pairwise(profile))
    steps = [after / before if difference == "divide" else after - before for before, after in pairs]
    mean, deviation = trimmed_mean(steps, limits=(0.05, 0.05)), trimmed_std(steps, limits=(0.05, 0.05), ddof=1)
    scored = [(abs(step - mean) / deviation, index + 1) for index, step in enumerate(steps)]
    return [layer for z, layer in sorted(scored, key=lambda item: (-item[0], item[1])) if z > 3]


def test_a_spike_flags_its_layer_and_the_way_down():
    assert find_outlier_layers(_with({22: 5.0}), difference="subtract") == [22, 23]


def test_a_first_layer_is_never_chosen():
    assert find_outlier_layers(_with({0: 9.0}), difference="subtract") == [1]


def test_top_m_keeps_the_largest():
    profile = _with({10: 3.0, 30: 9.0})
    everything = find_outlier_layers(profile, difference="divide")
    assert everything[0] == 30
    assert find_outlier_layers(profile, difference="divide", top_m=1) == [30]
    assert find_outlier_layers(profile, difference="divide", top_m=99) == everything


@given(
    st.lists(st.integers(1, 10_000).map(lambda value: value / 8), min_size=6, max_size=60),
    st.sampled_from(["subtract", "divide"]),
)
def test_agrees_with_the_algorithm_as_a_loop(profile, difference):
    steps = np.diff(profile) if difference == "subtract" else np.divide(profile[1:], profile[:-1])
    if trimmed_std(steps, limits=(0.05, 0.05), ddof=1) > 1e-9:
        assert sorted(find_outlier_layers(profile, difference=difference)) == sorted(_reference(profile, difference))


@pytest.mark.parametrize("difference", ["subtract", "divide"])
def test_equal_steps_have_no_outliers(difference):
    assert find_outlier_layers([2.5] * 8, difference=difference) == []
    steps = [0.1 * (layer + 1) for layer in range(32)] if difference == "subtract" else [1.1**i for i in range(32)]
    assert find_outlier_layers(steps, difference=difference) == []


def test_scores_have_no_value_at_layer_0():
    scores = layer_z_scores(WAVE, "subtract")
    assert scores.shape == (40,)
    assert np.isnan(scores[0])
    assert np.isfinite(scores[1:]).all()


@pytest.mark.parametrize(
    ("profile", "difference", "message"),
    [
        ([1.0, 2.0], "subtract", "at least 3"),
        ([[1.0, 2.0, 3.0]], "subtract", "one number per layer"),
        ([1.0, float("nan"), 2.0], "subtract", "layer 1 of the profile is nan"),
        ([1.0, float("inf"), 2.0], "divide", "layer 1 of the profile is inf"),
        ([1.0, 0.0, 2.0], "divide", "layer 1 of the profile is 0.*use 'subtract'"),
        ([1.0, 2.0, 3.0], "divde", "did you mean 'divide'"),
    ],
)
def test_bad_profiles_are_refused(profile, difference, message):
    with pytest.raises(InputError, match=message):
        find_outlier_layers(profile, difference=difference)


def test_negative_top_m_is_refused():
    with pytest.raises(InputError, match="top_m = -1 is negative"):
        find_outlier_layers(WAVE, difference="subtract", top_m=-1)


def test_modules_are_profiled_by_kind_over_the_layers_that_have_it():
    values = {ModuleId(2 * layer, "mlp.up_proj"): value for layer, value in enumerate(_with({22: 5.0}))}
    values |= {ModuleId(layer, "rare"): 1.0 + layer for layer in range(3)}
    found = outlier_modules(profiles_by_kind(values), difference="subtract")
    assert found == {"mlp.up_proj": [44, 46], "rare": []}


@pytest.mark.parametrize(("difference", "nothing"), [("subtract", None), ("divide", None), ("divide", 0.0)])
def test_layers_without_a_number_are_left_out(difference, nothing):
    """The others get the scores that they have as neighbours."""
    values = np.random.default_rng(1).uniform(1, 2, 30)
    values[21] = 40.0
    without = values.tolist()
    for layer in (3, 9, 29):
        without.insert(layer, nothing)
    rows = outlier_rows({ModuleId(layer, "q"): v for layer, v in enumerate(without)}, "s", difference=difference)
    assert [rows[layer]["z"] for layer in (3, 9, 29)] == [None] * 3
    kept = [row["z"] for layer, row in enumerate(rows) if layer not in (3, 9, 29)]
    assert kept[1:] == pytest.approx(layer_z_scores(values, difference)[1:])
    assert kept[0] is None
    assert not any(rows[layer]["outlier"] for layer in (3, 9, 29))
    dead = {ModuleId(layer, "dead"): nothing for layer in range(6)}
    assert outlier_modules(profiles_by_kind(dead), difference=difference) == {"dead": []}


def test_a_bad_kind_is_named():
    values = {ModuleId(layer, "mlp.up_proj"): float("nan") for layer in range(5)}
    with pytest.raises(InputError, match=r"mlp\.up_proj: layer 0"):
        outlier_modules(profiles_by_kind(values), difference="subtract")


def test_rows_fit_the_schema_and_hold_null_where_there_is_no_score(tmp_path):
    values = {ModuleId(layer, "q"): value for layer, value in enumerate(_with({22: 5.0}))} | {ModuleId(0, "rare"): 1.0}
    write_rows(tmp_path / "t.parquet", OUTLIERS_SCHEMA, outlier_rows(values, "kurtosis", difference="subtract"))
    rows = read_rows(tmp_path / "t.parquet", OUTLIERS_SCHEMA)
    assert [row["layer"] for row in rows if row["outlier"]] == [22, 23]
    assert [(row["kind"], row["layer"]) for row in rows if row["z"] is None] == [("q", 0), ("rare", 0)]
    assert outlier_rows({}, "kurtosis", difference="subtract") == []
