"""What was measured of a variant beside its perplexity, as fields of its record."""

from __future__ import annotations

import json
from typing import Any

from lmq.evaluation.task_scores import TaskScore, task_scores_from_json
from lmq.model.structure import ModelStructure
from lmq_tasks.evaluation import SIZE_FILE
from lmq_tasks.performance import PERFORMANCE_FILE
from lmq_tasks.report_inputs import InputsOf
from lmq_tasks.stage import Job, JsonDict
from lmq_tasks.zero_shot import SCORES_FILE


def judged_fields(job: Job, inputs: InputsOf, item: JsonDict) -> dict[str, Any]:
    """Memory, speed and zero-shot scores of the variant with these inputs; what is not there is None."""
    return {**_performance(job, inputs.part("performance")), "tasks": _scores(job, inputs, item.get("tasks", {}))}


def baseline_size(job: Job, evaluation: str, structure: ModelStructure) -> dict[str, Any]:
    """Size of a baseline, which has no allocation: as its evaluation wrote it down; empty for other variants."""
    if not job.has(evaluation) or job.ref(evaluation).stage not in ("evaluate-rounded", "evaluate-other"):
        return {}
    size = json.loads(job.input(evaluation, SIZE_FILE).read_text())
    return {**size, "bits_per_weight": 8 * size["size_bytes"] / structure.parameters}


def _performance(job: Job, name: str) -> dict[str, Any]:
    if not job.has(name):
        return {}
    found = json.loads(job.input(name, PERFORMANCE_FILE).read_text())
    measured = ("memory_resident_bytes", "peak_generation_bytes")
    speeds = ("prompt_tokens_per_second", "generation_tokens_per_second")
    return {key: found[key] for key in (*measured, *speeds)} | {"performance_host": found["host"]}


def _scores(job: Job, inputs: InputsOf, tasks: dict[str, str | None]) -> tuple[TaskScore, ...] | None:
    """Scores of every task of the run in its order; of one that failed the reason alone."""
    scores: list[TaskScore] = []
    for task, error in tasks.items():
        name = inputs.task(task)
        if job.has(name):
            scores += task_scores_from_json(json.loads(job.input(name, SCORES_FILE).read_text()))
        else:
            scores.append(TaskScore(task=task, error=error or "was not run"))
    return tuple(scores) or None
