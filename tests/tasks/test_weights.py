"""The stages that look at weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.tables import read_rows
from lmq_storage import ArtifactStore
from lmq_tasks.measure import MEASUREMENT_STAGES
from lmq_tasks.sources import discover_structure
from lmq_tasks.stage import ModelLocation, Site, as_inputs, run_stage

LAYER = 1


def test_statistics_of_every_module_of_a_layer_are_kept(tiny_qwen: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    site = Site(store_url=tmp_path.as_uri(), model=ModelLocation(kind="directory", place=str(tiny_qwen)))
    structure = run_stage(discover_structure, "0" * 64, site, {"weights_sha256": "0"}, {})
    found = run_stage(
        MEASUREMENT_STAGES["kurtosis"], "1" * 64, site, {"layer": LAYER}, as_inputs({"structure": structure})
    )
    rows = read_rows(store.path(found, "kurtosis.parquet"), WEIGHT_STATISTICS_SCHEMA)
    weights = load_layer_weights(tiny_qwen, discover(tiny_qwen, weights_sha256="0"), LAYER)
    assert {row["kind"] for row in rows} == set(weights)
    for row in rows:
        weight = weights[row["kind"]].double()
        assert row["layer"] == LAYER
        assert row["kurtosis"] == pytest.approx(stats.kurtosis(weight.numpy(), None, fisher=False), rel=1e-9)
        assert row["percentile_100"] == pytest.approx(float(weight.abs().max()))
        assert row["percentile_99"] == pytest.approx(float(torch.quantile(weight.abs().flatten(), 0.99)), rel=1e-9)
        assert row["grid_bits"] is None
