"""Stages that judge: the full-precision model's predictions, and every variant against them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lmq.checkpoint.open import QuantizedBlocks, open_model_directory
from lmq.evaluation.baselines import RoundedBaseline
from lmq.evaluation.perplexity import Window, full_windows
from lmq.evaluation.whole_model import reference_logits, require_same_model, score_whole_model, stored_bytes
from lmq.evaluation.windows import WINDOWS_SCHEMA, last_states, score_windows, window_tokens
from lmq.measurement.replay import read_hidden_states, write_hidden_states
from lmq.tables import write_rows
from lmq.text.calibration import read_tokens
from lmq_tasks.opened import materialized, model_dir, open_model
from lmq_tasks.stage import Job, stage
from lmq_tasks.states import HIDDEN_STATES_FILE
from lmq_tasks.texts import PREFIX_FILE, TOKENS_FILE

WINDOWS_FILE = "windows.parquet"
SIZE_FILE = "size.json"
"""What a baseline takes: size_bytes of its matrices, and checkpoint_bytes of its files or null."""


@stage("reference", version=3, schema="reference/1")
def reference(job: Job) -> None:
    """Perplexity of the full-precision model, and the states its predictions follow from."""
    _evaluate(job)


@stage("evaluate", version=3, schema=WINDOWS_SCHEMA.label)
def evaluate(job: Job) -> None:
    """Perplexity of a variant, and its divergence from the full-precision model."""
    _evaluate(job)


@stage("evaluate-without-layers", version=3, schema=WINDOWS_SCHEMA.label)
def evaluate_without_layers(job: Job) -> None:
    """Perplexity of the full-precision model without the layers `removed`, of which no checkpoint is written."""
    model = open_model(job)
    windows, tokens = _windows(job)
    states = last_states(model, tokens, skipped_layers=job.config["removed"])
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, score_windows(model, windows, tokens, states, None))


@stage("evaluate-rounded", version=2, schema=WINDOWS_SCHEMA.label)
def evaluate_rounded(job: Job) -> None:
    """Perplexity and divergence of a baseline that rounds every matrix alike, of which no checkpoint is written."""
    baseline = RoundedBaseline.parse(job.config["baseline"])
    model = open_model(job)
    baseline.check_fits(model.structure)
    windows, tokens = _windows(job)
    states = last_states(model, tokens, baseline.preparation(model.structure))
    full_precision = read_hidden_states(job.input("reference", HIDDEN_STATES_FILE))
    rows = score_windows(model, windows, tokens, states, full_precision)
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, rows)
    _write_size(job, baseline.size_bytes(model.structure), None)


@stage("evaluate-other", version=2, schema=WINDOWS_SCHEMA.label)
def evaluate_other(job: Job) -> None:
    """Perplexity and divergence of a checkpoint that another program made of the model, opened whole."""
    path = Path(job.site.places["checkpoint"])
    full = open_model(job)
    require_same_model(path, model_dir(job), full.structure)
    windows, tokens = _windows(job)
    states = read_hidden_states(job.input("reference", HIDDEN_STATES_FILE))
    model = open_model_directory(path, dtype=torch.float32, device=job.device, dense=True)
    rows = score_whole_model(model, windows, tokens, reference_logits(full, states))
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, rows)
    _write_size(job, *stored_bytes(path, full.structure))


def _write_size(job: Job, size_bytes: int, checkpoint_bytes: int | None) -> None:
    (job.output / SIZE_FILE).write_text(json.dumps({"size_bytes": size_bytes, "checkpoint_bytes": checkpoint_bytes}))


def _windows(job: Job) -> tuple[list[Window], Tensor]:
    """The windows of the evaluation tokens, and what the model sees in each."""
    stream = read_tokens(job.input("tokens", TOKENS_FILE))[0]
    prefix = json.loads(job.input("tokens", PREFIX_FILE).read_text())
    windows = full_windows(stream.numel(), job.config["window"], job.config["stride"])
    return windows, window_tokens(stream, windows, prefix)


def _evaluate(job: Job) -> None:
    model = open_model(job)
    windows, tokens = _windows(job)
    if not job.has("checkpoint"):
        states = last_states(model, tokens)
        rows = score_windows(model, windows, tokens, states, None)
        write_hidden_states(job.output / HIDDEN_STATES_FILE, states)
    else:
        quantized = QuantizedBlocks(materialized(job, "checkpoint"), model.structure)
        states = last_states(model, tokens, quantized.put_in)
        full_precision = read_hidden_states(job.input("reference", HIDDEN_STATES_FILE))
        rows = score_windows(model, windows, tokens, states, full_precision)
    write_rows(job.output / WINDOWS_FILE, WINDOWS_SCHEMA, rows)
