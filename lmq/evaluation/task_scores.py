"""Score of a model on a zero-shot task, as it stands in `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lmq.errors import InputError, NotFiniteError


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task: a share in 0..1 for accuracies, over `samples` questions, with its standard error.

    A task that could not be measured has no value, and `error` says why. Raises NotFiniteError for NaN or infinity.
    """

    task: str
    metric: str | None = None
    value: float | None = None
    stderr: float | None = None
    samples: int | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        for name in ("value", "stderr"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise NotFiniteError(f"{name} of task {self.task} is {number}; record None and say why in `error`")


_BY_LENGTH = ("arc_challenge", "hellaswag", "openbookqa")
"""Tasks of which papers print the accuracy that takes the length of an answer into account."""


def main_score(scores: Sequence[TaskScore] | None, task: str) -> TaskScore | None:
    """The metric of a task that papers print; None where none was measured."""
    measured = [score for score in scores or () if score.task == task and score.value is not None]
    wanted = "acc_norm" if task in _BY_LENGTH else "acc"
    return next((score for score in measured if score.metric == wanted), measured[0] if measured else None)


def task_scores_from_json(data: Any) -> tuple[TaskScore, ...]:
    """Scores from a list of plain objects. Raises InputError for anything else."""
    names = {field.name for field in fields(TaskScore)}
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise InputError(f"a list of task scores was expected, not {data!r}")
    for item in data:
        if not isinstance(item, Mapping) or set(item) != names:
            raise InputError(f"a task score has the keys {', '.join(sorted(names))}, unlike {item!r}")
    return tuple(TaskScore(**item) for item in data)
