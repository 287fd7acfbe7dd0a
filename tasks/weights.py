"""Stages that look at weights alone: their statistics, and the grids of every configuration with their errors."""

from __future__ import annotations

from dataclasses import asdict

from lmq.formats.spec import QuantSpec
from lmq.measurement.frobenius import FROBENIUS_SCHEMA, frobenius_errors, frobenius_norm
from lmq.measurement.grids import fit_grids, save_grids
from lmq.measurement.weights import WEIGHT_STATISTICS_SCHEMA, weight_statistics
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from lmq.tables import write_rows
from lmq_tasks.opened import layer_weights, read_structure
from lmq_tasks.stage import Job, stage


@stage("kurtosis", version=3, schema=WEIGHT_STATISTICS_SCHEMA.label)
def measure_kurtosis(job: Job) -> None:
    """Kurtosis and percentiles of every weight matrix of one layer, and the coarse grid it already lies on."""
    layer = job.config["layer"]
    weights = layer_weights(job, read_structure(job), layer)
    rows = [weight_statistics(ModuleId(layer, kind), weight) for kind, weight in weights.items()]
    write_rows(job.output / "kurtosis.parquet", WEIGHT_STATISTICS_SCHEMA, rows)


@stage("frobenius", version=2, schema=FROBENIUS_SCHEMA.label)
def measure_frobenius(job: Job) -> None:
    """Quantization grids of one layer for every configuration of the menu, and their Frobenius errors."""
    structure = read_structure(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    fitter = quantizer(**job.config["quantizer"])
    rows, layer_grids = [], {}
    weights = layer_weights(job, structure, layer)
    for module in structure.in_layer(layer):
        weight = weights[module.id.kind].to(job.device)
        grids = fit_grids(weight, menu, fitter, str(module.id))
        norm = frobenius_norm(weight)
        for spec, error in zip(grids, frobenius_errors(weight, list(grids.values())), strict=True):
            rows.append(
                {
                    "layer": layer,
                    "kind": module.id.kind,
                    **asdict(spec),
                    "parameters": module.parameters,
                    "size_bytes": spec.size_bytes(module.parameters),
                    "frobenius_error": error,
                    "frobenius_norm": norm,
                }
            )
        layer_grids[module.id] = grids
    write_rows(job.output / "frobenius.parquet", FROBENIUS_SCHEMA, rows)
    save_grids(job.output / "grids.safetensors", layer_grids)
