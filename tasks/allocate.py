"""Stages that choose the configuration of every module under a budget: from measurements, or by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from lmq.allocation.constraints import parse_constraints
from lmq.allocation.embeddings import set_embeddings_aside, with_embeddings
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.refine import LossChanges, ModelTrials, Refinement, Slice, Trials
from lmq.allocation.solver import ALLOCATION_SCHEMA, Allocation
from lmq.allocation.strategies import Auto, Measurements, strategy
from lmq.allocation.targets import target_named
from lmq.formats.spec import QuantSpec
from lmq.layers.importance.layers import layer_scores
from lmq.measurement.base import Cost
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.registry import COSTS, PROFILES
from lmq.measurement.replay import read_hidden_states
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.model.structure import EMBEDDINGS, ModelStructure, ModuleId
from lmq.tables import TableSchema, write_rows
from lmq_tasks.inputs import open_model, read_examples, read_structure
from lmq_tasks.measure import grids_by_layer, measured_rows, read_profile
from lmq_tasks.stage import Job, stage
from lmq_tasks.states import HIDDEN_STATES_FILE

ALLOCATION_FILE = "allocation.json"
SOLUTION_FILE = "solution.json"


def allocated(path: Callable[[str], Path]) -> str:
    """`56.5 MB`: what the matrices of an allocation take."""
    return f"{json.loads(path(SOLUTION_FILE).read_text())['size_bytes'] / 1e6:,.1f} MB"


@stage("allocate", version=4, schema=ALLOCATION_SCHEMA.label, result=allocated)
def allocate(job: Job) -> None:
    """Choose the configuration of every module under a budget in bytes.

    Files: allocation.parquet (with costs), solution.json (objective, bound), and the bare configurations, whole
    (`ALLOCATION_FILE`) and by layer (`layer_file`), so that equal ones share what follows.
    """
    chosen = strategy(job.config["strategy"], **job.config["options"])
    measurements = read_measurements(job, read_structure(job))
    aside, measurements, budget_bytes = set_embeddings_aside(chosen, measurements, job.config["budget_bytes"])
    write_allocation(job, with_embeddings(chosen.allocate(measurements, budget_bytes), aside))


def write_allocation(job: Job, allocation: Allocation, **extra: float | None) -> None:
    """Write the files of an allocation; `extra` is added to solution.json."""
    write_rows(job.output / "allocation.parquet", ALLOCATION_SCHEMA, allocation.to_rows())
    solution = {
        "size_bytes": allocation.size_bytes,
        "objective": allocation.objective,
        "lower_bound": allocation.lower_bound,
        "gap": allocation.gap,
        **extra,
    }
    (job.output / SOLUTION_FILE).write_text(json.dumps(solution))
    write_configurations(job.output / ALLOCATION_FILE, allocation.specs)
    for layer in sorted({module.layer for module in allocation.specs}):
        in_layer = {module: spec for module, spec in allocation.specs.items() if module.layer == layer}
        write_configurations(job.output / layer_file(layer), in_layer)


def read_measurements(job: Job, structure: ModelStructure, *, trials: Trials | None = None) -> Measurements:
    """What was measured of the model, as far as the strategy needs it."""
    menu = tuple(QuantSpec.parse(name) for name in job.config["menu"])
    costs = {name: _error_table(job, cost, menu) for name, cost in COSTS.items() if job.has(name)}
    activities = measured_rows(job, LAYER_ACTIVITY.name)
    return Measurements(
        modules=structure.quantized,
        menu=menu,
        costs=costs,
        profiles={name: read_profile(job, name) for name in PROFILES if job.has(name)},
        layer_scores=layer_scores(activities) if activities else None,
        trials=trials,
        constraints=parse_constraints(job.config.get("constraints", {})),
        target=target_named(job.config["target"]) if "target" in job.config else None,
        towers=tuple(map(structure.layers_of, range(len(structure.towers)))) if structure.several_towers else (),
    )


def _error_table(job: Job, cost: Cost, menu: tuple[QuantSpec, ...]) -> ErrorTable:
    rows = [row for row in measured_rows(job, cost.name) if spec_of(row) in menu]
    return ErrorTable.from_rows(rows, cost.columns[0].column)


def spec_of(row: dict[str, int]) -> QuantSpec:
    """The configuration that a table row is about."""
    return QuantSpec.from_row(row)


def layer_file(layer: int) -> str:
    """File of an allocation that holds the configurations of one layer, or of the embeddings."""
    return "embeddings.json" if layer == EMBEDDINGS else f"layer-{layer:03d}.json"


def write_configurations(path: Path, allocation: Mapping[ModuleId, QuantSpec]) -> None:
    """Write module → configuration as JSON; equal ones give equal bytes."""
    entries = [{**asdict(module), **asdict(spec)} for module, spec in sorted(allocation.items())]
    path.write_text(json.dumps(entries))


def read_configurations(path: Path) -> dict[ModuleId, QuantSpec]:
    """Inverse of `write_configurations`."""
    return {ModuleId(entry["layer"], entry["kind"]): spec_of(entry) for entry in json.loads(path.read_text())}


TRIALS_SCHEMA = TableSchema(
    "trials",
    1,
    pa.schema(
        [
            pa.field("origin", pa.string(), nullable=False),
            pa.field("changed_modules", pa.int64(), nullable=False),
            pa.field("divergence", pa.float64()),
        ]
    ),
)
"""Every plan that was tried: `divergence` in nats per token on the validation slice, null where it broke the model."""


@stage("refine", version=4, schema=ALLOCATION_SCHEMA.label, result=allocated)
def refine(job: Job) -> None:
    """Choose the configuration of every module by trying plans on the model, under a budget in bytes.

    Files: those of `allocate`, and trials.parquet. solution.json also says the divergence on the validation slice
    of the plan and of uniform.
    """
    model = open_model(job)
    chosen = strategy(job.config["strategy"], **job.config["options"])
    assert isinstance(chosen, Auto)
    point = QuantizedPoint(model, grids_by_layer(job))
    validation = read_examples(job, "validation").inputs
    trials = ModelTrials(
        point,
        calibration=Slice(
            token_ids=read_examples(job).inputs,
            reference_states=read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE)),
        ),
        validation=Slice(token_ids=validation, reference_states=point.last_states(validation)),
        loss_changes=_loss_changes(job),
    )
    measurements = read_measurements(job, model.structure, trials=trials)
    aside, measurements, budget_bytes = set_embeddings_aside(chosen, measurements, job.config["budget_bytes"])
    allocation, refinement = chosen.refine(measurements, budget_bytes)
    write_allocation(
        job,
        with_embeddings(allocation, aside),
        validation_divergence=_finite(refinement.loss),
        uniform_validation_divergence=_finite(refinement.uniform_loss),
    )
    write_rows(job.output / "trials.parquet", TRIALS_SCHEMA, _trial_rows(refinement))


def _loss_changes(job: Job) -> LossChanges:
    return {
        (ModuleId(row["layer"], row["kind"]), spec_of(row)): np.array(row["loss_changes"])
        for row in measured_rows(job, SEQUENCE_FISHER.name)
        if row["layer"] != EMBEDDINGS
    }


def _trial_rows(refinement: Refinement) -> list[dict[str, object]]:
    return [
        {"origin": step.origin, "changed_modules": step.changed_modules, "divergence": _finite(step.loss)}
        for step in refinement.tried
    ]


def _finite(loss: float) -> float | None:
    return loss if np.isfinite(loss) else None
