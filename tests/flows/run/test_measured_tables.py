"""Measurements that were asked for: in the graph, and as tables beside a run's results."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq.measurement.activation import SENSITIVITY_SCHEMA
from lmq.measurement.delta_loss import DELTA_LOSS_SCHEMA
from lmq.measurement.frobenius import FROBENIUS_SCHEMA
from lmq.measurement.module_divergence import MODULE_DIVERGENCE_SCHEMA
from lmq.measurement.registry import MEASUREMENTS
from lmq.measurement.second_moments import MODULE_ERRORS_SCHEMA
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER_SCHEMA
from lmq.measurement.super_weights import SUPER_WEIGHTS_SCHEMA
from lmq.measurement.token_fisher import FISHER_SCHEMA
from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA
from lmq.tables import read_rows
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.node import Node
from lmq_flows.run.measured_tables import write_measured_tables
from lmq_flows.run.plan import ready_models
from lmq_storage import ArtifactRef
from lmq_tasks.stage import open_store
from tests.flows.conftest import tiny_config

SCHEMAS = {
    "frobenius": FROBENIUS_SCHEMA,
    "kurtosis": WEIGHT_STATISTICS_SCHEMA,
    "sensitivity": SENSITIVITY_SCHEMA,
    "fisher": FISHER_SCHEMA,
    "sequence-fisher": SEQUENCE_FISHER_SCHEMA,
    "divergence": MODULE_DIVERGENCE_SCHEMA,
    "super-weights": SUPER_WEIGHTS_SCHEMA,
    "module-errors": MODULE_ERRORS_SCHEMA,
    "delta-loss": DELTA_LOSS_SCHEMA,
}


@pytest.fixture(scope="module")
def made(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run that uses nothing and measures everything, and its measured artifacts."""
    config = tiny_config(
        tiny_qwen,
        tmp_path_factory.mktemp("also"),
        strategies=["uniform"],
        calibration={"sequences": 2, "sequence_length": 16},
        measure={"menu": ["b3g64", "b4g64"], "also": list(MEASUREMENTS)},
    )
    models, texts = ready_models(config)
    graph, _, measured = build_graph(config, models, texts)
    found = measured["tiny"]
    nodes = [node for table in found.tables.values() for node in table]
    return open_store(config.store), measured, execute_directly(graph, nodes)


def test_every_measurement_becomes_one_table_of_all_layers(made, tmp_path: Path) -> None:
    store, measured, refs = made
    write_measured_tables(tmp_path / "measurements", store, measured, refs)
    names = {name.replace("_", "-") for name in MEASUREMENTS}
    assert {path.name for path in (tmp_path / "measurements").iterdir()} == {f"tiny-{name}.parquet" for name in names}
    for name, schema in SCHEMAS.items():
        rows = read_rows(tmp_path / "measurements" / f"tiny-{name}.parquet", schema)
        assert {row["layer"] for row in rows} == {0, 1, 2, 3}
        assert len({row["kind"] for row in rows}) == (1 if name == "super-weights" else 7)


def test_a_measurement_that_lacks_a_layer_is_left_out(made, tmp_path: Path) -> None:
    store, measured, refs = made
    partly: dict[Node, ArtifactRef | None] = {**refs, measured["tiny"].tables["fisher"][2]: None}
    write_measured_tables(tmp_path / "measurements", store, measured, partly)
    tables = {path.name for path in (tmp_path / "measurements").iterdir()}
    assert "tiny-fisher.parquet" not in tables
    assert "tiny-sequence-fisher.parquet" in tables
