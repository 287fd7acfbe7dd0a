"""Stages that capture activations: forward through the blocks one by one, and back again with the gradient."""

from __future__ import annotations

from lmq.calibration import read_tokens
from lmq.capture import GRADIENTS_SCHEMA, HIDDEN_STATES_SCHEMA, backward_block, forward_block, read_states, write_states
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage

STATES_FILE = "states.parquet"


@stage("embed", version=1, schema=HIDDEN_STATES_SCHEMA)
def embed(job: Job) -> None:
    """States that enter the first block for the calibration tokens."""
    tokens = read_tokens(job.input("tokens", "tokens.parquet"))
    write_states(job.output / STATES_FILE, open_model(job).embed(tokens), HIDDEN_STATES_SCHEMA)
