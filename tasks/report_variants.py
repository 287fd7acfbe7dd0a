"""What a run measured of a variant, read from the artifacts that the report is given."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmq.allocation.solver import ALLOCATION_SCHEMA
from lmq.evaluation.predictions import PREDICTIONS_SCHEMA, PredictionSummary, summarize_predictions
from lmq.evaluation.task_scores import TaskScore, task_scores_from_json
from lmq.evaluation.windows import WINDOWS_SCHEMA, Estimate, Evaluation, summarize
from lmq.model.structure import ModelStructure
from lmq.report.results import FULL_PRECISION, VariantResult
from lmq.tables import TableSchema, read_rows
from lmq_storage import Manifest
from lmq_tasks.evaluate import PERFORMANCE_FILE, PREDICTIONS_FILE, SCORES_FILE, SIZE_FILE, WINDOWS_FILE
from lmq_tasks.stage import Job, JsonDict
from lmq_tasks.tuning import KEPT_FILE

_BASELINE_STAGES = ("evaluate-rounded", "evaluate-rounded-images", "evaluate-other")


@dataclass(frozen=True)
class InputsOf:
    """Names of the report's inputs that belong to one model or to one variant."""

    owner: str

    @classmethod
    def model(cls, name: str) -> InputsOf:
        """Those of a model: `structure`, `all` of its artifacts, `outliers`, and a table per measurement."""
        return cls(name)

    @classmethod
    def variant(cls, number: int) -> InputsOf:
        """Those of a variant, by its place among the variants of the report's configuration."""
        return cls(f"variant {number}")

    def part(self, name: str) -> str:
        """Name of one input: of a variant `allocation`, `checkpoint`, `evaluation` or `performance`."""
        return f"{self.owner} {name}"

    def task(self, name: str) -> str:
        """Name of the input that holds the scores of a zero-shot task."""
        return self.part(f"task {name}")


class ReportedVariant:
    """One variant's measured windows and allocation, and the record made of them."""

    def __init__(self, job: Job, number: int, item: JsonDict, structures: dict[str, ModelStructure]):
        self.item = item
        self.slug = item["slug"]
        inputs = InputsOf.variant(number)
        evaluation = inputs.part("evaluation")
        on_images = job.has(evaluation) and job.ref(evaluation).stage.endswith("-images")
        self.windows = [] if on_images else rows_of(job, evaluation, WINDOWS_FILE, WINDOWS_SCHEMA)
        self.predictions = rows_of(job, evaluation, PREDICTIONS_FILE, PREDICTIONS_SCHEMA) if on_images else []
        self.allocation = rows_of(job, inputs.part("allocation"), "allocation.parquet", ALLOCATION_SCHEMA)
        self.result = self._result(job, inputs, structures.get(item["model"]))

    def _result(self, job: Job, inputs: InputsOf, structure: ModelStructure | None) -> VariantResult:
        measured, note = _measured(summarize(self.windows) if self.windows else None)
        scores = _scores(job, inputs, self.item.get("tasks", {}))
        if self.predictions:
            found = summarize_predictions(self.predictions)
            measured, scores = _divergences(found, found.perplexity), (*found.scores, *(scores or ())) or None
        item = self.item
        is_reference = item["strategy"] == FULL_PRECISION
        size = _size(job, inputs, structure, self.allocation, is_reference)
        return VariantResult(
            model=item["model"],
            strategy=item["strategy"],
            quantizer=_quantizer(job, inputs, item),
            budget=item["budget"],
            budget_bytes=item["budget_bytes"],
            seconds=_seconds(job, inputs.part("evaluation")),
            checkpoint=None if is_reference or not job.has(inputs.part("checkpoint")) else f"checkpoints/{self.slug}",
            error=item["error"] or note,
            **size,
            **measured,
            **_solution(job, inputs),
            **_performance(job, inputs.part("performance")),
            tasks=scores,
        )


def _measured(evaluation: Evaluation | None) -> tuple[dict[str, Any], str | None]:
    """Fields of the record that an evaluation gives, and a remark when perplexity is infinite."""
    if evaluation is None:
        return {}, None
    finite = math.isfinite(evaluation.perplexity.value)
    fields = {
        **_divergences(evaluation, evaluation.perplexity if finite else None),
        "tokens": evaluation.scored_tokens,
    }
    broken = evaluation.broken_window
    where = f", first in the window of tokens {broken.start} to {broken.end}" if broken else ""
    return fields, None if finite else f"perplexity is infinite{where}: the model gives tokens no probability"


def _divergences(found: Evaluation | PredictionSummary, perplexity: Estimate | None) -> dict[str, Any]:
    """Fields of the record that texts and images share."""
    kl = found.kl_divergence
    return {
        "perplexity": perplexity.value if perplexity else None,
        "perplexity_stderr": perplexity.stderr if perplexity else None,
        "kl_divergence": kl.value if kl else None,
        "kl_divergence_stderr": kl.stderr if kl else None,
        "kl_p99": found.kl_p99,
        "top1_agreement": found.top1_agreement,
        "protocol": found.protocol,
    }


def _size(
    job: Job, inputs: InputsOf, structure: ModelStructure | None, allocation: Sequence[JsonDict], is_reference: bool
) -> dict[str, Any]:
    """Sizes of a variant, as far as they are known: of a model that could not be used there are none."""
    if structure is None:
        return {}
    if is_reference:
        size_bytes = structure.source_bytes
        checkpoint_bytes: int | None = size_bytes + structure.other_bytes
    elif allocation:
        size_bytes = sum(row["size_bytes"] for row in allocation)
        manifest = _manifest(job, inputs.part("checkpoint"))
        checkpoint_bytes = manifest.size_bytes if manifest else None
    else:
        return _baseline_size(job, inputs.part("evaluation"), structure)
    return {
        "size_bytes": size_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "bits_per_weight": 8 * size_bytes / structure.parameters,
        "predicted_bytes": size_bytes + structure.other_bytes,
    }


def _baseline_size(job: Job, evaluation: str, structure: ModelStructure) -> dict[str, Any]:
    """Size of a baseline, which has no allocation: as its evaluation wrote it down; empty for other variants."""
    if not job.has(evaluation) or job.ref(evaluation).stage not in _BASELINE_STAGES:
        return {}
    size = json.loads(job.input(evaluation, SIZE_FILE).read_text())
    return {**size, "bits_per_weight": 8 * size["size_bytes"] / structure.parameters}


def _solution(job: Job, inputs: InputsOf) -> dict[str, Any]:
    if not job.has(inputs.part("allocation")):
        return {}
    solution = json.loads(job.input(inputs.part("allocation"), "solution.json").read_text())
    names = ("objective", "lower_bound", "gap", "validation_divergence", "uniform_validation_divergence")
    return {name: solution.get(name) for name in names}


def _performance(job: Job, name: str) -> dict[str, Any]:
    """Memory and speed of the variant, empty where they were not measured."""
    if not job.has(name):
        return {}
    performance = json.loads(job.input(name, PERFORMANCE_FILE).read_text())
    memory = ("memory_resident_bytes", "peak_generation_bytes")
    speeds = ("prompt_tokens_per_second", "generation_tokens_per_second")
    return {key: performance[key] for key in (*memory, *speeds)} | {"performance_host": performance["host"]}


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


def _quantizer(job: Job, inputs: InputsOf, item: JsonDict) -> str | None:
    """What made the codes, and how their grids were tuned: `fisher-gptq, learned, polished`."""
    name: str | None = item["quantizer"]
    for part in ("learned", "polished"):
        if job.has(inputs.part(part)) and json.loads(job.input(inputs.part(part), KEPT_FILE).read_text())["kept"]:
            name = f"{name}, {part}"
    return name


def _manifest(job: Job, name: str) -> Manifest | None:
    if not job.has(name):
        return None
    ref = job.ref(name)
    return job.store.manifest(ref.stage, ref.key)


def _seconds(job: Job, name: str) -> float | None:
    manifest = _manifest(job, name)
    return manifest.seconds if manifest else None


def rows_of(job: Job, name: str, file: str, schema: TableSchema) -> list[JsonDict]:
    """Rows of one input, none where it was not given."""
    return read_rows(job.input(name, file), schema) if job.has(name) else []
