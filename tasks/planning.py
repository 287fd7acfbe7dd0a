"""Stage that decides: the configuration of every module, by a strategy, under a budget."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lmq.allocation.constraints import parse_constraints
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.refine import Trials
from lmq.allocation.solver import ALLOCATION_SCHEMA, Allocation
from lmq.allocation.strategies import Measurements, strategy
from lmq.formats.spec import QuantSpec
from lmq.layers.importance.layers import LAYER_ACTIVITY_SCHEMA, layer_scores
from lmq.measurement.activation import SENSITIVITY_SCHEMA
from lmq.measurement.divergence import MODULE_DIVERGENCE_SCHEMA
from lmq.measurement.frobenius import FROBENIUS_SCHEMA
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER_SCHEMA
from lmq.measurement.token_fisher import FISHER_SCHEMA
from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA
from lmq.model.structure import ModelStructure, ModuleId
from lmq.tables import TableSchema, read_rows, write_rows
from lmq_tasks.importance import ACTIVITY_FILE
from lmq_tasks.opened import read_structure
from lmq_tasks.signals import read_profile
from lmq_tasks.stage import Job, stage


@stage("allocate", version=1, schema=ALLOCATION_SCHEMA.label)
def allocate(job: Job) -> None:
    """Choose the configuration of every module under a budget in bytes.

    Files: allocation.parquet (with costs), solution.json (objective, bound), and the bare choice, whole
    (choice.json) and by layer (layer-000.json, ...), so that equal choices share what follows.
    """
    chosen = strategy(job.config["strategy"], **job.config["options"])
    measurements = read_measurements(job, read_structure(job))
    write_allocation(job, chosen.allocate(measurements, job.config["budget_bytes"]))


def write_allocation(job: Job, allocation: Allocation, **found: float | None) -> None:
    """Write the files of an allocation; `found` is added to solution.json."""
    write_rows(job.output / "allocation.parquet", ALLOCATION_SCHEMA, allocation.to_rows())
    solution = {
        "size_bytes": allocation.size_bytes,
        "objective": allocation.objective,
        "lower_bound": allocation.lower_bound,
        "gap": allocation.gap,
        **found,
    }
    (job.output / "solution.json").write_text(json.dumps(solution))
    write_choice(job.output / "choice.json", allocation.specs)
    for layer in sorted({module.layer for module in allocation.specs}):
        in_layer = {module: spec for module, spec in allocation.specs.items() if module.layer == layer}
        write_choice(job.output / f"layer-{layer:03d}.json", in_layer)


def read_measurements(job: Job, structure: ModelStructure, *, trials: Trials | None = None) -> Measurements:
    """What was measured of the model, as far as the strategy needs it."""
    menu = tuple(QuantSpec.parse(name) for name in job.config["menu"])
    return Measurements(
        modules=structure.modules,
        menu=menu,
        kurtosis=read_profile(job, "kurtosis", WEIGHT_STATISTICS_SCHEMA) or None,
        sensitivity=read_profile(job, "sensitivity", SENSITIVITY_SCHEMA) or None,
        frobenius=_error_table(job, "frobenius", "frobenius.parquet", FROBENIUS_SCHEMA, "frobenius_error", menu),
        fisher=_error_table(job, "fisher", "fisher.parquet", FISHER_SCHEMA, "fisher", menu),
        sequence_fisher=_error_table(job, "sequence_fisher", "fisher.parquet", SEQUENCE_FISHER_SCHEMA, "fisher", menu),
        divergence=_error_table(job, "divergence", "divergence.parquet", MODULE_DIVERGENCE_SCHEMA, "divergence", menu),
        layer_importance=_layer_importance(job),
        trials=trials,
        constraints=parse_constraints(job.config.get("constraints", {})),
    )


def _error_table(
    job: Job, name: str, file: str, schema: TableSchema, column: str, menu: tuple[QuantSpec, ...]
) -> ErrorTable | None:
    if not job.has(name):
        return None
    rows = [row for path in job.inputs(name, file) for row in read_rows(path, schema)]
    return ErrorTable.from_rows([row for row in rows if spec_of(row) in menu], column)


def _layer_importance(job: Job) -> dict[str, list[float]] | None:
    if not job.has("layer_importance"):
        return None
    paths = job.inputs("layer_importance", ACTIVITY_FILE)
    return layer_scores([row for path in paths for row in read_rows(path, LAYER_ACTIVITY_SCHEMA)])


def spec_of(row: dict[str, int]) -> QuantSpec:
    """The configuration that a table row is about."""
    return QuantSpec(row["bits"], row["group_size"], row["meta_bits"], row["meta_group_size"])


def write_choice(path: Path, choice: dict[ModuleId, QuantSpec]) -> None:
    """Write module → configuration as JSON; equal choices give equal bytes."""
    entries = [{**asdict(module), **asdict(spec)} for module, spec in sorted(choice.items())]
    path.write_text(json.dumps(entries))


def read_choice(path: Path) -> dict[ModuleId, QuantSpec]:
    """Inverse of `write_choice`."""
    return {ModuleId(entry["layer"], entry["kind"]): spec_of(entry) for entry in json.loads(path.read_text())}
