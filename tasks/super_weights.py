"""Stage that looks for super weights: the spikes in what enters and leaves the down projections."""

from __future__ import annotations

from lmq.measurement.replay import read_hidden_states
from lmq.measurement.super_weights import SUPER_WEIGHTS_SCHEMA, capture_spikes
from lmq.tables import write_rows
from lmq_tasks.capture import HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage


@stage("super-weights", version=2, schema=SUPER_WEIGHTS_SCHEMA.label)
def find_super_weights(job: Job) -> None:
    """Largest input and output of every down projection of one layer."""
    model = open_model(job)
    layer = job.config["layer"]
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    down = [module.id for module in model.structure.in_layer(layer) if module.part == "mlp_down"]
    with model.block(layer) as block:
        rows = capture_spikes(block, model.block_inputs(hidden.shape[1])[layer], hidden, down)
    write_rows(job.output / "super-weights.parquet", SUPER_WEIGHTS_SCHEMA, rows)
