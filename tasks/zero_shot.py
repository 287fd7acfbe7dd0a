"""Stage that asks a variant the questions of one zero-shot task, through lm-eval."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from lmq.checkpoint.open import open_model_directory
from lmq.evaluation.baselines import RoundedBaseline
from lmq.evaluation.zero_shot import load_task, measure_task
from lmq.text.calibration import load_tokenizer
from lmq_tasks.opened import model_dir, read_structure
from lmq_tasks.performance import variant_dir
from lmq_tasks.stage import Job, stage

SCORES_FILE = "scores.json"


@stage("zero-shot", version=1, schema="task-scores/1")
def zero_shot(job: Job) -> None:
    """Accuracies of a variant on one task, with their standard errors.

    The questions are looked for before the model is opened. A task without them fails and is not kept, so that it is
    asked again once they are there.
    """
    task = load_task(job.site.places.get("task", job.config["task"]))
    dtype = torch.float32 if job.device.type == "cpu" else None
    model = open_model_directory(variant_dir(job), dtype=dtype, device=job.device, dense=True)
    if "baseline" in job.config:
        RoundedBaseline.parse(job.config["baseline"]).round_model(model, read_structure(job))
    scores = measure_task(model, load_tokenizer(model_dir(job)), task, limit=job.config["limit"])
    (job.output / SCORES_FILE).write_text(json.dumps([asdict(score) for score in scores]))
