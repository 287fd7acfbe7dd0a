"""Stages that turn text into tokens: blocks to calibrate on, a stream to evaluate on."""

from __future__ import annotations

import json

from lmq.text.calibration import (
    TOKENS_SCHEMA,
    TextSource,
    documents,
    load_tokenizer,
    pack_tokens,
    text_prefix,
    token_stream,
    write_tokens,
)
from lmq_tasks.opened import model_dir
from lmq_tasks.stage import Job, stage

TOKENS_FILE = "tokens.parquet"
PREFIX_FILE = "prefix.json"


@stage("calibration", version=2, schema=TOKENS_SCHEMA.label)
def draw_calibration(job: Job) -> None:
    """Calibration tokens, packed into sequences; with `skipped`, those that come after as many others."""
    config = job.config
    skipped = config.get("skipped", 0)
    tokenizer = load_tokenizer(model_dir(job))
    tokens = pack_tokens(
        documents(_source(job), tokenizer),
        tokenizer,
        sequence_length=config["sequence_length"],
        sequences=skipped + config["sequences"],
        seed=config["seed"],
    )
    write_tokens(job.output / TOKENS_FILE, tokens[skipped:])


@stage("evaluation-tokens", version=2, schema=TOKENS_SCHEMA.label)
def draw_evaluation(job: Job) -> None:
    """Evaluation tokens, one stream, and the tokens that every window begins with."""
    tokenizer = load_tokenizer(model_dir(job))
    tokens = token_stream(documents(_source(job), tokenizer), tokenizer, job.config["tokens"])
    write_tokens(job.output / TOKENS_FILE, tokens[None])
    (job.output / PREFIX_FILE).write_text(json.dumps(text_prefix(tokenizer)))


def _source(job: Job) -> TextSource:
    assert job.site.text is not None, "this stage was given no text"
    return TextSource(
        source=job.site.text, column=job.config["column"], part=job.config["part"], seed=job.config["seed"]
    )
