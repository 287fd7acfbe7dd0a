"""Strategies that try plans or single modules on the model, in a whole run."""

from __future__ import annotations

import json

import pytest

from lmq.measurement.module_divergence import MODULE_DIVERGENCE_SCHEMA
from lmq.report.results import read_results
from lmq.tables import read_rows
from lmq_storage import ArtifactStore
from lmq_tasks.allocate import TRIALS_SCHEMA
from tests.flows.conftest import run_and_look, tiny_config

pytestmark = pytest.mark.slow

STRATEGIES = ["uniform", {"name": "auto", "options": {"rounds": 1}}, "kl"]


@pytest.fixture(scope="module")
def finished(server, tiny_gemma, tmp_path_factory):
    config = tiny_config(
        tiny_gemma,
        tmp_path_factory.mktemp("run"),
        strategies=STRATEGIES,
        budgets=["uniform b3g32"],
        calibration={"sequences": 2, "sequence_length": 32, "validation_sequences": 2},
    )
    return config, run_and_look(config)


def test_tried_plans_keep_the_budget_and_say_what_they_gain(finished):
    config, done = finished
    assert done.state.is_completed(), done.state.message
    results = read_results(config.run_dir / "results.json")
    assert [result.strategy for result in results] == ["full-precision", "uniform", "auto rounds=1", "kl"]
    for result in results[1:]:
        assert result.size_bytes <= result.budget_bytes
        assert result.kl_divergence > 0

    store = ArtifactStore(config.store)
    (refined,) = (manifest.ref for manifest in store.manifests() if manifest.stage == "refine")
    solution = json.loads(store.path(refined, "solution.json").read_text())
    trials = read_rows(store.path(refined, "trials.parquet"), TRIALS_SCHEMA)
    measured = {row["origin"]: row["divergence"] for row in trials}
    assert solution["validation_divergence"] in measured.values()
    assert all(solution["validation_divergence"] <= measured[name] for name in ("uniform", "mxq", "loss-aware"))
    assert solution["validation_divergence"] <= solution["uniform_validation_divergence"]
    auto = next(result for result in results if result.strategy == "auto rounds=1")
    assert auto.validation_divergence == solution["validation_divergence"]
    assert auto.uniform_validation_divergence == solution["uniform_validation_divergence"]
    assert {row["origin"] for row in trials} >= {"uniform", "structural", "kurt-boost", "mxq", "loss-aware"}


def test_divergence_is_measured_of_every_module_alone(finished):
    config, _ = finished
    store = ArtifactStore(config.store)
    layers = [manifest.ref for manifest in store.manifests() if manifest.stage == "divergence"]
    rows = [row for ref in layers for row in read_rows(store.path(ref, "divergence.parquet"), MODULE_DIVERGENCE_SCHEMA)]
    assert len(rows) == 4 * 7 * 3
    assert all(row["divergence"] > 0 and row["divergence_stderr"] >= 0 for row in rows)
    by_bits = {bits: sum(row["divergence"] for row in rows if row["bits"] == bits) for bits in (2, 3, 4)}
    assert by_bits[2] > by_bits[3] > by_bits[4]


def test_longer_validation_tries_plans_again_and_measures_nothing(finished):
    config, _ = finished
    longer = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"validation_sequences": 3})}
    )
    done = run_and_look(longer)
    assert "refine" in done.ran()
    assert done.ran() <= {"calibration", "refine", "quantize", "checkpoint", "evaluate", "report"}
