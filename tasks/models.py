"""Stages that read a model for the first time: conversion to safetensors, and its structure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from lmq.checkpoint.dry_run import dry_run
from lmq.model.discovery import discover
from lmq.model.source import convert_gguf
from lmq_tasks.opened import model_dir
from lmq_tasks.stage import Job, stage


@stage("convert", version=1, schema="model/1")
def convert_model(job: Job) -> None:
    """Convert a GGUF file to a directory of safetensors with its tokenizer."""
    assert job.site.model is not None, "this stage was given no model"
    target = job.output / "model"
    dtype = None if job.config["dtype"] == "exact" else getattr(torch, job.config["dtype"])
    convert_gguf(Path(job.site.model.place), target, dtype)
    for path in target.iterdir():
        shutil.move(path, job.output / path.name)
    target.rmdir()


@stage("discover", version=3, schema="structure/1")
def discover_structure(job: Job) -> None:
    """Discover layers, modules, kinds and parts of a model; refuse by name what cannot be quantized or measured."""
    sha256 = job.ref("model").sha256 if job.has("model") else job.config["weights_sha256"]
    structure = discover(model_dir(job), weights_sha256=sha256)
    dry_run(model_dir(job), structure)
    (job.output / "structure.json").write_text(json.dumps(structure.to_json()))
