"""Stages that measure: one for every measurement of the registry, and the grids that most of them start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from safetensors.torch import save_file

from lmq.formats.spec import QuantSpec
from lmq.measurement.base import LayerReplay, Measurement, Need, cost_row
from lmq.measurement.delta_loss import DELTA_LOSS
from lmq.measurement.frobenius import FROBENIUS, frobenius_errors, frobenius_norm
from lmq.measurement.grids import LayerGrids, load_grids, quantize_modules, save_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.quantizer_moments import (
    input_moments,
    load_moments,
    save_moments,
)
from lmq.measurement.registry import MEASUREMENTS, PROFILES
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.experts import every_token
from lmq.model.structure import ModuleId
from lmq.outliers import OUTLIERS_SCHEMA, outlier_rows
from lmq.quantizers import quantizer
from lmq.tables import read_rows, write_rows
from lmq_tasks.inputs import layer_weights, open_model, read_examples, read_structure
from lmq_tasks.stage import Job, JsonDict, Stage, stage
from lmq_tasks.states import GRADIENTS_FILE, HIDDEN_STATES_FILE, MOMENTS_FILE

GRIDS_FILE = "grids.safetensors"
TENSORS_FILE = "tensors.safetensors"
"""What a measurement keeps for other stages, beside its table."""


def open_layer(job: Job) -> LayerReplay:
    """The layer of a job with the inputs that the job was given; nothing is read before it is asked for."""
    readers: dict[Need, tuple[str, Callable[..., Any]]] = {
        Need.GRIDS: (GRIDS_FILE, load_grids),
        Need.STATES: (HIDDEN_STATES_FILE, read_hidden_states),
        Need.LEAVING_STATES: (HIDDEN_STATES_FILE, read_hidden_states),
        Need.LAST_STATES: (HIDDEN_STATES_FILE, read_hidden_states),
        Need.TEXT_GRADIENTS: (GRADIENTS_FILE, read_gradients),
        Need.DRAWN_GRADIENTS: (GRADIENTS_FILE, read_gradients),
        Need.MOMENTS: (MOMENTS_FILE, load_moments),
    }
    structure = read_structure(job)
    layer = job.config["layer"]

    def reader(need: Need, file: str, read: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: read(job.input(need.value, job.file_of(need.value) or file))

    return LayerReplay(
        structure,
        layer,
        device=job.device,
        settings=job.config,
        open_model=lambda: open_model(job),
        read_weights=lambda: layer_weights(job, structure, layer),
        inputs={need: reader(need, *how) for need, how in readers.items() if job.has(need.value)},
    )


def measure_layer(job: Job, measurement: Measurement) -> None:
    """Write the table of one layer, and what the measurement keeps beside it."""
    assert measurement.measure is not None
    with open_layer(job) as layer:
        write_rows(job.output / measurement.file, measurement.schema, list(measurement.measure(layer)))
        if measurement.tensors is not None:
            save_file(measurement.tensors(layer), job.output / TENSORS_FILE)


def measurement_stage(measurement: Measurement) -> Stage:
    """The stage that measures this of one layer."""
    assert measurement.measure is not None

    def body(job: Job) -> None:
        measure_layer(job, measurement)

    body.__doc__ = measurement.measure.__doc__
    made_by = tuple(each for each in (measure_layer, measurement.measure, measurement.tensors) if each is not None)
    return Stage(measurement.stage, measurement.version, measurement.schema.label, body, made_by)


MEASUREMENT_STAGES: Mapping[str, Stage] = {
    measurement.name: measurement_stage(measurement)
    for measurement in MEASUREMENTS.values()
    if measurement.measure is not None
}
"""By the name of the measurement."""


@stage("second-moments", version=2, schema="second-moments/1")
def measure_second_moments(job: Job) -> None:
    """Plain second moments of one layer's inputs, for quantizers."""
    with open_layer(job) as layer:
        kinds = [module.id.kind for module in layer.modules]
        with every_token(layer.block, job.config.get("expert_tokens") == "all"):
            moments = input_moments(layer.block, layer.block_inputs, layer.hidden, kinds)
    save_moments(job.output / MOMENTS_FILE, moments)


@stage("grids", version=4, schema=FROBENIUS.schema.label)
def make_grids(job: Job) -> None:
    """Quantization grids of one layer for every configuration of the menu, and their Frobenius errors.

    Quantizers that choose codes have these kept beside the grids: what is measured of them is what will be stored.
    """
    structure = read_structure(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    fitter = quantizer(**job.config["quantizer"])
    rows = []
    by_kind = layer_weights(job, structure, layer)
    weights = {module.id: by_kind[module.id.kind].to(job.device) for module in structure.in_layer(layer)}
    layer_grids = quantize_modules(weights, menu, fitter, _second_moments(job, weights))
    for module in structure.in_layer(layer):
        weight, grids = weights[module.id], layer_grids[module.id]
        norm = frobenius_norm(weight)
        errors = frobenius_errors(weight, list(grids.values()))
        rows += [
            cost_row(module, spec, frobenius_error=error, frobenius_norm=norm)
            for spec, error in zip(grids, errors, strict=True)
        ]
    write_rows(job.output / FROBENIUS.file, FROBENIUS.schema, rows)
    save_grids(job.output / GRIDS_FILE, layer_grids)


def _second_moments(job: Job, modules: Iterable[ModuleId]) -> dict[ModuleId, UpperTriangle] | None:
    if not job.has("moments"):
        return None
    by_kind = load_moments(job.input("moments", MOMENTS_FILE))
    return {module: by_kind[module.kind] for module in modules}


def grids_by_layer(job: Job) -> Callable[[int], LayerGrids]:
    """Reads the grids of a layer; those of the layer that was read last are kept."""
    files = job.inputs("grids", GRIDS_FILE)
    return lru_cache(maxsize=1)(lambda layer: load_grids(files[layer]))


@stage("delta-loss", version=1, schema=DELTA_LOSS.schema.label)
def measure_delta_loss(job: Job) -> None:
    """Delta loss of every module on the calibration text, with all modules at one configuration."""
    model = open_model(job)
    spec = QuantSpec.parse(job.config["spec"])
    modules = model.structure.modules
    point = QuantizedPoint(model, grids_by_layer(job))
    examples = read_examples(job)
    delta_losses = point.delta_losses(examples.inputs, {module.id: spec for module in modules}, examples.labels)
    rows = [
        cost_row(module, spec, delta_loss=delta_loss)
        for module, delta_loss in zip(modules, delta_losses.tolist(), strict=True)
    ]
    write_rows(job.output / DELTA_LOSS.file, DELTA_LOSS.schema, rows)


@stage("outliers", version=3, schema=OUTLIERS_SCHEMA.label)
def find_outliers(job: Job) -> None:
    """Outlier layers of every module kind, by each profile that was measured."""
    structure = read_structure(job)
    rows = [
        row
        for name, profile in PROFILES.items()
        for layers in map(structure.layers_of, range(len(structure.towers)))
        for row in outlier_rows(_within(read_profile(job, name), layers), name, difference=profile.difference)
    ]
    write_rows(job.output / "outliers.parquet", OUTLIERS_SCHEMA, rows)


def _within(profile: Mapping[ModuleId, float | None], layers: range) -> dict[ModuleId, float | None]:
    """The numbers of these layers: neighbours are those of one tower."""
    return {module: number for module, number in profile.items() if module.layer in layers}


def read_profile(job: Job, name: str) -> dict[ModuleId, float | None]:
    """One number per module from the tables of all layers, None where it has none; empty when it was not measured."""
    return {ModuleId(row["layer"], row["kind"]): row[name] for row in measured_rows(job, name)}


def measured_rows(job: Job, name: str, given_as: str | None = None) -> list[JsonDict]:
    """Rows of a measurement's tables, which are the input of its name or `given_as`; none when it was not measured."""
    measurement = MEASUREMENTS[name]
    given_as = given_as or name
    if not job.has(given_as):
        return []
    return [row for path in job.inputs(given_as, measurement.file) for row in read_rows(path, measurement.schema)]
