"""Stage of the delta loss: one pass forward and one back through the model quantized at one configuration."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

from lmq.formats.spec import QuantSpec
from lmq.measurement.delta_loss import DELTA_LOSS_SCHEMA
from lmq.measurement.grids import load_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.tables import write_rows
from lmq.text.calibration import read_tokens
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage
from lmq_tasks.texts import TOKENS_FILE


@stage("delta-loss", version=1, schema=DELTA_LOSS_SCHEMA.label)
def measure_delta_loss(job: Job) -> None:
    """Delta loss of every module on the calibration text, with all modules at one configuration."""
    model = open_model(job)
    spec = QuantSpec.parse(job.config["spec"])
    grid_files = job.inputs("frobenius", "grids.safetensors")
    point = QuantizedPoint(model, lru_cache(maxsize=1)(lambda layer: load_grids(grid_files[layer])))
    modules = model.structure.modules
    found = point.delta_losses(read_tokens(job.input("tokens", TOKENS_FILE)), {module.id: spec for module in modules})
    rows = [
        {
            **asdict(module.id),
            **asdict(spec),
            "parameters": module.parameters,
            "size_bytes": spec.size_bytes(module.parameters),
            "delta_loss": delta_loss,
        }
        for module, delta_loss in zip(modules, found.tolist(), strict=True)
    ]
    write_rows(job.output / "delta-loss.parquet", DELTA_LOSS_SCHEMA, rows)
