"""Stage of the exact cost: the divergence that each module of a layer causes alone."""

from __future__ import annotations

from dataclasses import asdict

from lmq.capture import read_hidden_states
from lmq.frobenius import load_grids
from lmq.module_divergence import MODULE_DIVERGENCE_SCHEMA, standard_error
from lmq.quant_spec import QuantSpec
from lmq.quantized_point import QuantizedPoint
from lmq.tables import write_rows
from lmq_tasks.capture import HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage


@stage("module-divergence", version=1, schema=MODULE_DIVERGENCE_SCHEMA.label)
def measure_module_divergence(job: Job) -> None:
    """Divergence of the model with one module of a layer quantized, on the first calibration sequences.

    `hidden` enters the layer, `last` leaves the last block.
    """
    model = open_model(job)
    layer = job.config["layer"]
    specs = [QuantSpec.parse(name) for name in job.config["specs"]]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    first = slice(job.config["sequences"])
    hidden, last = (read_hidden_states(job.input(name, HIDDEN_STATES_FILE))[first] for name in ("hidden", "last"))
    pairs = [(module, spec) for module in model.structure.in_layer(layer) for spec in specs]
    found = QuantizedPoint(model, lambda _: grids).divergences_alone(
        layer, hidden, last, [(module.id, spec) for module, spec in pairs]
    )
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
