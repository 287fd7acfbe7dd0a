"""Adding a measurement: one file in `lmq/measurement`, and its entry in the registry. In a copy of the packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lmq
import lmq_flows
import lmq_storage
import lmq_tasks

TOY = '''
"""Largest weight error: a toy."""

from collections.abc import Iterator

import pyarrow as pa

from lmq.measurement.base import Cost, CostColumn, LayerReplay, Need, Row, cost_row, cost_schema


def measure_largest_error(layer: LayerReplay) -> Iterator[Row]:
    """Largest |E| of every module of one layer under every configuration of the menu."""
    for module in layer.modules:
        for spec, error in layer.errors(module):
            yield cost_row(module, spec, largest_error=float(error.abs().max()))


LARGEST_ERROR = Cost(
    name="largest_error",
    title="Largest weight error",
    schema=cost_schema("largest-error", 1, pa.field("largest_error", pa.float64(), nullable=False)),
    needs=frozenset({Need.GRIDS}),
    settings=("menu",),
    measure=measure_largest_error,
    columns=(
        CostColumn(
            name="largest_error",
            column="largest_error",
            label="largest error",
            title="The largest error of all",
            meaning="Largest difference between a weight and its quantized form.",
        ),
    ),
)
'''

RUN = """
import json, sys
from pathlib import Path

from lmq.report.data import ModelReport
from lmq.allocation.error_table import ErrorTable
from lmq.report.sections.costs import costs_part
from lmq.tables import read_rows
from lmq.measurement.registry import COSTS
from lmq_flows.config.run import parse_run_config
from lmq_flows.graph.build import build_graph
from lmq_flows.run.measured_tables import write_measured_tables
from lmq_flows.run.plan import execute_directly, ready_models
from lmq_tasks.stage import open_store

model, place = sys.argv[1:]
config = parse_run_config({
    "name": "toy", "models": [{"name": "tiny", "source": model}], "strategies": ["uniform"],
    "budgets": ["uniform b4g64"],
    "measure": {"menu": ["b3g64", "b4g64"], "quantizer": "hqq", "also": ["largest_error"]},
    "evaluation": {"tokens": 64, "window": 32, "stride": 16}, "store": place + "/store",
})
models, texts = ready_models(config)
graph, _, measured = build_graph(config, models, texts)
nodes = measured["tiny"].tables["largest_error"]
refs = execute_directly(graph, nodes)
write_measured_tables(Path(place) / "tables", open_store(config.store), {"tiny": measured["tiny"]}, {
    node: refs.get(node) for node in graph
})
rows = read_rows(Path(place) / "tables" / "tiny-largest-error.parquet", COSTS["largest_error"].schema)
table = ErrorTable.from_rows(rows, "largest_error")
shown = costs_part(ModelReport(name="tiny", structure=models[0].structure, costs={"largest_error": table}))
print(json.dumps({
    "stages": [node.stage.name for node in nodes], "calibration": config.needs_calibration,
    "rows": len(rows), "positive": all(row["largest_error"] > 0 for row in rows), "columns": list(rows[0]),
    "shown": "The largest error of all" in shown,
}))
"""


def test_a_measurement_is_one_file_and_its_entry_in_the_registry(tiny_llama: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    for package in (lmq, lmq_flows, lmq_storage, lmq_tasks):
        source = Path(package.__path__[0])
        shutil.copytree(source, packages / package.__name__, ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "lmq" / "measurement" / "largest_error.py").write_text(TOY)
    registry = packages / "lmq" / "measurement" / "registry.py"
    text = registry.read_text()
    text = text.replace("    FROBENIUS,\n", "    FROBENIUS,\n    LARGEST_ERROR,\n")
    text = text.replace("\nM = TypeVar", "from lmq.measurement.largest_error import LARGEST_ERROR\n\nM = TypeVar", 1)
    registry.write_text(text)

    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny_llama), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "stages": ["largest-error"] * 4,
        "calibration": False,
        "rows": 4 * 7 * 2,
        "positive": True,
        "columns": [
            *("layer", "kind", "bits", "group_size", "meta_bits", "meta_group_size", "parameters", "size_bytes"),
            "largest_error",
        ],
        "shown": True,
    }
