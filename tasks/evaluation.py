"""Stages that judge: the full-precision model's predictions, and every variant against them."""

from __future__ import annotations

from lmq.capture import read_states, write_states
from lmq.checkpoint import QuantizedBlocks
from lmq.calibration import read_tokens
from lmq.evaluation import WINDOWS_SCHEMA, last_states, score_windows, window_tokens
from lmq.perplexity import full_windows
from lmq.tables import write_rows
from lmq_tasks.opened import materialized, open_model
from lmq_tasks.stage import Job, stage


@stage("reference", version=1, schema="reference/1")
def reference(job: Job) -> None:
    """Perplexity of the full-precision model, and the states its predictions follow from."""
    _evaluate(job)


@stage("evaluate", version=1, schema=WINDOWS_SCHEMA.label)
def evaluate(job: Job) -> None:
    """Perplexity of a variant, and its divergence from the full-precision model."""
    _evaluate(job)


def _evaluate(job: Job) -> None:
    model = open_model(job)
    stream, prefix = read_tokens(job.input("tokens", "tokens.parquet"))
    windows = full_windows(stream.numel(), job.config["window"], job.config["stride"])
    tokens = window_tokens(stream, windows, prefix)
    if not job.has("checkpoint"):
        states = last_states(model, tokens)
        rows = score_windows(model, windows, tokens, states, None)
        write_states(job.output / "states.parquet", states)
    else:
        quantized = QuantizedBlocks(materialized(job, "checkpoint"), model.structure)
        states = last_states(model, tokens, quantized.put_in)
        full_precision = read_states(job.input("reference", "states.parquet"))
        rows = score_windows(model, windows, tokens, states, full_precision)
    write_rows(job.output / "windows.parquet", WINDOWS_SCHEMA, rows)
