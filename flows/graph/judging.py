"""What stands beside perplexity: baselines to compare with, zero-shot tasks, memory and speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmq.errors import InputError
from lmq.evaluation.zero_shot import is_local_task, lm_eval_version, local_task_files, task_name
from lmq.model.source import ModelSource, locate, source_digest
from lmq_flows.config.sections import BaselineConfig, EvaluationConfig
from lmq_flows.graph.node import Input
from lmq_storage import canonical_json, file_sha256, text_sha256
from lmq_tasks.stage import open_store

PERFORMANCE_TOKENS = {"prompt_tokens": 128, "generated_tokens": 16}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is judged, in the form stages take: what identifies it, what it is made from, where it lies."""

    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def opens(self) -> bool:
        """Whether there is something to open: a rounding is made in memory and never stored."""
        return "baseline" not in self.config


def baseline_subject(baseline: BaselineConfig, store_url: str) -> Subject:
    """A baseline as it is judged. Raises InputError for a directory that is not there or holds no model."""
    if baseline.path is None:
        return Subject(config={"baseline": baseline.label})
    path = Path(baseline.path).expanduser().absolute()
    try:
        located = locate(ModelSource.parse(str(path)))
    except InputError as error:
        raise InputError(f"baseline {baseline.name!r}: {error}") from error
    sha256 = source_digest(located, open_store(store_url).local_dir / "digests.json")
    return Subject(config={"weights_sha256": sha256}, places={"checkpoint": str(path)})


@dataclass(frozen=True, kw_only=True)
class Task:
    """A zero-shot task: its name, what identifies it, where the file of a local one lies.

    Of a local task the questions are in the key, of one of lm-eval's the release that defines it.
    """

    name: str
    config: dict[str, Any]
    places: dict[str, str]


def evaluation_tasks(evaluation: EvaluationConfig) -> list[Task]:
    """The tasks of a run. Raises InputError for a local task file, or a file of its data, that is not there."""
    return [_task(task, evaluation.task_limit) for task in evaluation.tasks]


def _task(task: str, limit: int | None) -> Task:
    config: dict[str, Any] = {"task": task_name(task), "limit": limit, "lm_eval": lm_eval_version()}
    if not is_local_task(task):
        return Task(name=task, config=config, places={})
    path = Path(task).expanduser().absolute()
    digests = [file_sha256(file) for file in local_task_files(path)]
    config["questions_sha256"] = text_sha256(canonical_json(digests))
    return Task(name=config["task"], config=config, places={"task": str(path)})
