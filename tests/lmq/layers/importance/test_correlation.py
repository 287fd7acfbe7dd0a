import math
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from lmq.layers.importance.correlation import rank_correlations
from lmq.layers.importance.tables import (
    ANGULAR_DISTANCE_SCHEMA,
    LAYER_IMPORTANCE_SCHEMA,
    LAYER_METRICS,
    SUBLAYER_IMPORTANCE_SCHEMA,
)
from lmq.tables import read_rows, write_rows


def test_correlations_equal_scipys_and_are_symmetric() -> None:
    metrics = {"a": [1.0, 5.0, 2.0, 9.0], "b": [0.1, 0.3, 0.3, 0.2], "c": [9.0, 2.0, 5.0, 1.0]}
    found = rank_correlations(metrics)
    assert found["a"]["b"] == pytest.approx(spearmanr(metrics["a"], metrics["b"]).statistic)
    assert found["b"]["a"] == found["a"]["b"]
    assert found["a"]["a"] == pytest.approx(1)
    assert found["a"]["c"] == pytest.approx(-1)


def test_layers_that_either_metric_lacks_do_not_count() -> None:
    found = rank_correlations({"a": [1.0, None, 3.0, 4.0, 7.0], "b": [1.0, 100.0, 3.0, math.nan, 5.0]})
    assert found["a"]["b"] == pytest.approx(1)


@pytest.mark.parametrize("other", [[2.0, 2.0, 2.0, 2.0], [None, None, 1.0, 2.0], [None] * 4])
def test_correlations_that_are_not_defined_are_none(other: list[float | None]) -> None:
    found = rank_correlations({"a": [1.0, 2.0, 3.0, 4.0], "b": other})
    assert (found["a"]["b"], found["b"]["b"]) == (None, None)


def test_tables_keep_what_was_not_measured_as_null(tmp_path: Path) -> None:
    layer = {"layer": 0, **dict.fromkeys(LAYER_METRICS), "avss": 0.5}
    sublayer = {"layer": 0, "sublayer": "mlp", "shapley": 1.0, "shapley_stderr": None, "leave_one_out": None}
    block = {"first_layer": 2, "block_layers": 3, "angular_distance": 0.25}
    for schema, row in (
        (LAYER_IMPORTANCE_SCHEMA, layer),
        (SUBLAYER_IMPORTANCE_SCHEMA, sublayer),
        (ANGULAR_DISTANCE_SCHEMA, block),
    ):
        write_rows(tmp_path / "table.parquet", schema, [row])
        assert read_rows(tmp_path / "table.parquet", schema) == [row]
