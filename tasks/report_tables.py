"""Reads what a run measured of a model, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import QuantSpec
from lmq.layers.importance.layers import LAYER_ACTIVITY_SCHEMA
from lmq.measurement.activation import SENSITIVITY_SCHEMA
from lmq.measurement.coarse_grid import CoarseGrid, coarse_grid_warnings
from lmq.measurement.delta_loss import DELTA_LOSS_SCHEMA
from lmq.measurement.divergence import MODULE_DIVERGENCE_SCHEMA
from lmq.measurement.frobenius import FROBENIUS_SCHEMA
from lmq.measurement.second_moments import MODULE_ERRORS_SCHEMA
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER_SCHEMA
from lmq.measurement.super_weights import SUPER_WEIGHTS_SCHEMA
from lmq.measurement.token_fisher import FISHER_SCHEMA
from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA
from lmq.model.structure import ModelStructure, ModuleId
from lmq.outliers import OUTLIERS_SCHEMA
from lmq.report import ModelReport
from lmq.tables import TableSchema, read_rows
from lmq_tasks.stage import Job, JsonDict

_COST_TABLES = {
    "sequence_fisher": ("sequence_fisher", SEQUENCE_FISHER_SCHEMA, "fisher"),
    "fisher": ("fisher", FISHER_SCHEMA, "fisher"),
    "divergence": ("divergence", MODULE_DIVERGENCE_SCHEMA, "divergence"),
    "delta_loss": ("delta_loss", DELTA_LOSS_SCHEMA, "delta_loss"),
    "first_order_loss": ("module_errors", MODULE_ERRORS_SCHEMA, "delta_loss"),
    "fisher_weighted": ("module_errors", MODULE_ERRORS_SCHEMA, "fisher_weighted"),
    "fisher_diagonal": ("module_errors", MODULE_ERRORS_SCHEMA, "fisher_diagonal"),
    "input_error": ("module_errors", MODULE_ERRORS_SCHEMA, "input_error"),
    "frobenius": ("frobenius", FROBENIUS_SCHEMA, "frobenius_error"),
}
"""Cost of the report → measurement, schema and column it is read from."""
_TABLE_FILES = {"sequence_fisher": "fisher", "layer_importance": "activity"}
"""Files of measurements that are not called like them."""


def model_report(
    job: Job, name: str, structure: ModelStructure, allocations: Mapping[str, list[JsonDict]]
) -> ModelReport:
    """What was measured of the model `name`; `allocations` are rows by the label of their variant."""
    statistics = _layer_rows(job, name, "kurtosis", WEIGHT_STATISTICS_SCHEMA)
    costs = {
        cost: _cost_table(_layer_rows(job, name, measurement, schema), column)
        for cost, (measurement, schema, column) in _COST_TABLES.items()
    }
    frobenius = costs["frobenius"]
    return ModelReport(
        name=name,
        structure=structure,
        statistics=statistics,
        sensitivity=_layer_rows(job, name, "sensitivity", SENSITIVITY_SCHEMA),
        outliers=rows_of(job, f"{name} outliers", "outliers.parquet", OUTLIERS_SCHEMA),
        super_weights=_layer_rows(job, name, "super_weights", SUPER_WEIGHTS_SCHEMA),
        layer_activity=_layer_rows(job, name, "layer_importance", LAYER_ACTIVITY_SCHEMA),
        costs={cost: table for cost, table in costs.items() if table is not None},
        allocations=allocations,
        warnings=_coarse_grid_warnings(job, name, statistics, frobenius.specs) if frobenius else [],
    )


def rows_of(job: Job, name: str, file: str, schema: TableSchema) -> list[JsonDict]:
    """Rows of one input, none where it was not given."""
    return read_rows(job.input(name, file), schema) if job.has(name) else []


def _layer_rows(job: Job, model: str, measurement: str, schema: TableSchema) -> list[JsonDict]:
    name = f"{model} {measurement}"
    if not job.has(name):
        return []
    file = _TABLE_FILES.get(measurement, measurement.replace("_", "-"))
    return [row for path in job.inputs(name, f"{file}.parquet") for row in read_rows(path, schema)]


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
    ref = job.refs(f"{name} frobenius")[0]
    manifest = job.store.manifest(ref.stage, ref.key)
    axis = manifest.config["quantizer"]["axis"] if manifest else 1
    return coarse_grid_warnings(found, sorted(menu), axis=axis)
