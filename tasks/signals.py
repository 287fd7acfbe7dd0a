"""Stages that measure what quantization does to a layer, replaying its block alone; and outlier layers."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from lmq.formats import FORMATS, Format, rounding_format
from lmq.formats.groups import Grid
from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import SENSITIVITY_SCHEMA, part_sensitivities
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.token_fisher import FISHER_SCHEMA, token_fisher
from lmq.measurement.traces import trace_modules
from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA
from lmq.model.structure import ModuleId
from lmq.numerics import fast_matmul_dtype
from lmq.outliers import OUTLIERS_SCHEMA, outlier_rows
from lmq.tables import TableSchema, read_rows, write_rows
from lmq_tasks.capture import GRADIENTS_FILE, HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage


@stage("sensitivity", version=4, schema=SENSITIVITY_SCHEMA.label)
def measure_sensitivity(job: Job) -> None:
    """Activation sensitivity of one layer's parts at one configuration.

    Weights are rounded to the grids of `frobenius`, or, where `quantizer` names a format of `lmq.formats`, to that
    format in groups of the configuration's size.
    """
    model = open_model(job)
    layer = job.config["layer"]
    spec = QuantSpec.parse(job.config["spec"])
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    modules = model.structure.in_layer(layer)
    rounded_to: dict[ModuleId, Grid | Format]
    if (name := job.config.get("quantizer", "")) in FORMATS:
        rounded_to = {module.id: rounding_format(name, group_size=spec.group_size) for module in modules}
    else:
        grids = load_grids(job.input("frobenius", "grids.safetensors"))
        rounded_to = {module.id: grids[module.id][spec].to(job.device) for module in modules}
    with model.block(layer) as block:
        quantized = {
            module.id.kind: rounded_to[module.id].round_trip(_weight(block, module.id.kind)) for module in modules
        }
        scores = part_sensitivities(block, model.block_inputs(hidden.shape[1])[layer], hidden, modules, quantized)
    rows = [
        {
            "layer": layer,
            "kind": module.id.kind,
            "part": module.part,
            **asdict(spec),
            "sensitivity": scores[module.part],
        }
        for module in modules
    ]
    write_rows(job.output / "sensitivity.parquet", SENSITIVITY_SCHEMA, rows)


@stage("fisher", version=2, schema=FISHER_SCHEMA.label)
def measure_fisher(job: Job) -> None:
    """Token-wise Fisher cost of every module of one layer under every configuration of the menu."""
    model = open_model(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE))
    modules = model.structure.in_layer(layer)
    rows = []
    with model.block(layer) as block:
        inputs = model.block_inputs(hidden.shape[1])[layer]
        kinds = [module.id.kind for module in modules]
        traces = trace_modules(block, inputs, hidden, gradient, kinds, fast_matmul_dtype(job.device))
        for module in modules:
            weight = _weight(block, module.id.kind)
            for spec in menu:
                error = grids[module.id][spec].to(job.device).round_trip(weight) - weight
                rows.append(
                    {
                        "layer": layer,
                        "kind": module.id.kind,
                        **asdict(spec),
                        "parameters": module.parameters,
                        "size_bytes": spec.size_bytes(module.parameters),
                        "fisher": token_fisher(traces[module.id.kind], error),
                    }
                )
    write_rows(job.output / "fisher.parquet", FISHER_SCHEMA, rows)


@stage("outliers", version=2, schema=OUTLIERS_SCHEMA.label)
def find_outliers(job: Job) -> None:
    """Outlier layers of every module kind, by kurtosis and by sensitivity."""
    rows = [
        *outlier_rows(read_profile(job, "kurtosis", WEIGHT_STATISTICS_SCHEMA), "kurtosis", difference="subtract"),
        *outlier_rows(read_profile(job, "sensitivity", SENSITIVITY_SCHEMA), "sensitivity", difference="divide"),
    ]
    write_rows(job.output / "outliers.parquet", OUTLIERS_SCHEMA, rows)


def read_profile(job: Job, name: str, schema: TableSchema) -> dict[ModuleId, float | None]:
    """One number per module from the tables of all layers, None where it has none; empty when it was not measured."""
    if not job.has(name):
        return {}
    rows = [row for path in job.inputs(name, f"{name}.parquet") for row in read_rows(path, schema)]
    return {ModuleId(row["layer"], row["kind"]): row[name] for row in rows}


def _weight(block: nn.Module, kind: str) -> Tensor:
    return block.get_parameter(f"{kind}.weight").detach()
