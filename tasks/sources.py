"""Stages that read a model and a text for the first time: conversion, structure, token ids."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.equalized import write_equalized
from lmq.images.pairs import SCHEMA as PAIRS_SCHEMA
from lmq.images.pairs import PairDraw, pack_pairs, write_pairs
from lmq.images.prepared import SCHEMA as IMAGES_SCHEMA
from lmq.images.prepared import ImageDraw, prepare_images, write_images
from lmq.images.prompts import class_names, prompt_tokens
from lmq.model.discovery import discover, left_out
from lmq.model.source import convert_gguf
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
from lmq_tasks.inputs import IMAGES_FILE, PAIRS_FILE, TOKENS_FILE, model_dir
from lmq_tasks.stage import Job, stage


@stage("convert", version=1, schema="model/1")
def convert_model(job: Job) -> None:
    """Convert a GGUF file to a directory of safetensors with its tokenizer."""
    target = job.output / "model"
    _convert(job, target)
    _move_up(target)


@stage("equalize", version=2, schema="model/1")
def equalize_model(job: Job) -> None:
    """A copy of the model with channels rescaled between its matrices, measured on the calibration text.

    A GGUF file is converted for that, and the conversion not kept.
    """
    target = job.output / "model"
    with TemporaryDirectory(dir=job.output.parent) as folder:
        source = model_dir(job)
        if "dtype" in job.config:
            source = Path(folder) / "converted"
            _convert(job, source)
        tokenizer = load_tokenizer(source)
        sizes = {name: job.config[name] for name in ("sequence_length", "sequences", "seed")}
        tokens = pack_tokens(documents(_source(job), tokenizer), tokenizer, **sizes)
        write_equalized(source, discover(source), tokens, target, device=job.device, advance=job.advance)
    _move_up(target)


def _convert(job: Job, target: Path) -> None:
    assert job.site.model is not None, "this stage was given no model"
    dtype = None if job.config["dtype"] == "exact" else getattr(torch, job.config["dtype"])
    convert_gguf(Path(job.site.model.place), target, dtype)


def _move_up(directory: Path) -> None:
    """Have the files of a folder in the one above it."""
    for path in directory.iterdir():
        shutil.move(path, directory.parent / path.name)
    directory.rmdir()


@stage("discover", version=6, schema="structure/1")
def discover_structure(job: Job) -> None:
    """Discover layers, modules, kinds and parts of a model; refuse by name what cannot be quantized or measured."""
    sha256 = job.ref("model").sha256 if job.has("model") else job.config["weights_sha256"]
    embeddings = job.config.get("embeddings", False)
    patterns = job.config.get("modules", ())
    find = partial(discover, model_dir(job), weights_sha256=sha256, embeddings=embeddings, beside=patterns)
    structure = find()
    kept = dry_run(model_dir(job), structure)
    if patterns:
        kept = tuple({*kept, *left_out(structure, patterns)})
    if kept:
        structure = find(kept=kept)
    (job.output / "structure.json").write_text(json.dumps(structure.to_json()))


PREFIX_FILE = "prefix.json"
CLASSES_FILE = "classes.json"


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


@stage("images", version=1, schema=IMAGES_SCHEMA)
def draw_images(job: Job) -> None:
    """Images drawn from a source and prepared by the model's own processor, with their labels."""
    options = {name: value for name, value in job.config.items() if name != "images"}
    draw = ImageDraw(source=job.site.places["images"], **options)
    write_images(job.output / IMAGES_FILE, prepare_images(draw, model_dir(job)))


@stage("pairs", version=1, schema=PAIRS_SCHEMA)
def draw_pairs(job: Job) -> None:
    """Images with text from a source, prepared by the model's own processor and packed into sequences."""
    options = {name: value for name, value in job.config.items() if name != "images"}
    draw = PairDraw(source=job.site.places["images"], **options)
    write_pairs(job.output / PAIRS_FILE, pack_pairs(draw, model_dir(job)))


@stage("prompts", version=1, schema=TOKENS_SCHEMA.label)
def write_prompts(job: Job) -> None:
    """Token ids of a text for every class of a source of images and every template, and the names of the classes."""
    options = {name: job.config[name] for name in ("column", "label_column")}
    classes = class_names(job.site.places["images"], **options)
    count = job.config.get("count")
    token_ids = prompt_tokens(classes, job.config["templates"], model_dir(job), count=count, seed=job.config["seed"])
    write_tokens(job.output / TOKENS_FILE, token_ids)
    (job.output / CLASSES_FILE).write_text(json.dumps(classes))


def _source(job: Job) -> TextSource:
    assert job.site.text is not None, "this stage was given no text"
    return TextSource(
        source=job.site.text, column=job.config["column"], part=job.config["part"], seed=job.config["seed"]
    )
