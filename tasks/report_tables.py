"""Reads what a run measured of a model, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import QuantSpec
from lmq.measurement.coarse_grid import CoarseGrid, coarse_grid_warnings
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.measurement.registry import COSTS, MEASUREMENTS, PROFILES
from lmq.measurement.super_weights import SUPER_WEIGHTS
from lmq.measurement.weights import KURTOSIS
from lmq.model.structure import ModelStructure, ModuleId
from lmq.outliers import OUTLIERS_SCHEMA
from lmq.report import ModelReport
from lmq.tables import TableSchema, read_rows
from lmq_tasks.measure import measured_rows
from lmq_tasks.report_inputs import InputsOf
from lmq_tasks.stage import Job, JsonDict


def model_report(
    job: Job, name: str, structure: ModelStructure, allocations: Mapping[str, list[JsonDict]]
) -> ModelReport:
    """What was measured of the model `name`; `allocations` are rows by the label of their variant."""
    inputs = InputsOf.model(name)
    rows = {measurement: measured_rows(job, measurement, inputs.part(measurement)) for measurement in MEASUREMENTS}
    statistics = rows[KURTOSIS.name]
    costs = {
        column.name: _cost_table(rows[cost.name], column.column) for cost in COSTS.values() for column in cost.columns
    }
    frobenius = costs["frobenius"]
    return ModelReport(
        name=name,
        structure=structure,
        profiles={profile: rows[profile] for profile in PROFILES},
        outliers=rows_of(job, inputs.part("outliers"), "outliers.parquet", OUTLIERS_SCHEMA),
        super_weights=rows[SUPER_WEIGHTS.name],
        layer_activity=rows[LAYER_ACTIVITY.name],
        costs={cost: table for cost, table in costs.items() if table is not None},
        allocations=allocations,
        warnings=_coarse_grid_warnings(job, name, statistics, frobenius.specs) if frobenius else [],
    )


def rows_of(job: Job, name: str, file: str, schema: TableSchema) -> list[JsonDict]:
    """Rows of one input, none where it was not given."""
    return read_rows(job.input(name, file), schema) if job.has(name) else []


def _cost_table(rows: Sequence[JsonDict], column: str) -> ErrorTable | None:
    """The column as a table; None where it was not measured, or not of every module."""
    whole = bool(rows) and all(row[column] is not None for row in rows)
    return ErrorTable.from_rows(rows, column) if whole else None


def _coarse_grid_warnings(job: Job, name: str, statistics: Sequence[JsonDict], menu: Sequence[QuantSpec]) -> list[str]:
    """Sentences about measured configurations that the source's own quantization makes unfair."""
    if not statistics:
        return []
    found = {
        ModuleId(row["layer"], row["kind"]): row["grid_bits"] and CoarseGrid(row["grid_bits"], row["grid_group_size"])
        for row in statistics
    }
    ref = job.refs(InputsOf.model(name).part(FROBENIUS.name))[0]
    manifest = job.store.manifest(ref.stage, ref.key)
    axis = manifest.config["quantizer"]["axis"] if manifest else 1
    return coarse_grid_warnings(found, sorted(menu), axis=axis)
