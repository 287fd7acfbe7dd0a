"""Stage of the exact cost: the divergence that each module of a layer causes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from lmq.formats.spec import QuantSpec
from lmq.measurement.divergence import MODULE_DIVERGENCE_SCHEMA, standard_error
from lmq.measurement.grids import load_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.replay import read_hidden_states
from lmq.model.structure import ModuleInfo
from lmq.tables import write_rows
from lmq_tasks.capture import HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage


@stage("module-divergence", version=2, schema=MODULE_DIVERGENCE_SCHEMA.label)
def measure_module_divergence(job: Job) -> None:
    """Divergence of the model with one module of a layer quantized, on the first calibration sequences.

    `hidden` enters the layer, `last` leaves the last block. Measured are all modules at every configuration of
    `specs`, or the `pairs` of a module kind and a configuration. Products are taken in float32, as those of the
    captured states: in bfloat16 their rounding alone would cost more than a module at 4 bits does.
    """
    model = open_model(job)
    layer = job.config["layer"]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    first = slice(job.config["sequences"])
    hidden, last = (read_hidden_states(job.input(name, HIDDEN_STATES_FILE))[first] for name in ("hidden", "last"))
    pairs = _pairs(job, model.structure.in_layer(layer))
    exact = QuantizedPoint(model, lambda _: grids, matmul_dtype=torch.float32)
    found = exact.divergences_alone(layer, hidden, last, [(module.id, spec) for module, spec in pairs])
    rows = [
        {
            **asdict(module.id),
            **asdict(spec),
            "parameters": module.parameters,
            "size_bytes": spec.size_bytes(module.parameters),
            "divergence": float(divergences.mean()),
            "divergence_stderr": standard_error(divergences),
        }
        for (module, spec), divergences in zip(pairs, found, strict=True)
    ]
    write_rows(job.output / "divergence.parquet", MODULE_DIVERGENCE_SCHEMA, rows)


def _pairs(job: Job, modules: Sequence[ModuleInfo]) -> list[tuple[ModuleInfo, QuantSpec]]:
    if "pairs" in job.config:
        by_kind = {module.id.kind: module for module in modules}
        return [(by_kind[kind], QuantSpec.parse(name)) for kind, name in job.config["pairs"]]
    return [(module, QuantSpec.parse(name)) for module in modules for name in job.config["specs"]]
