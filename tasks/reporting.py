"""Stage that reports: results.json, report.html, the allocations as CSV, and the pictures for the UI."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lmq.allocation.solver import ALLOCATION_SCHEMA
from lmq.evaluation.windows import WINDOWS_SCHEMA, Evaluation, paired_difference, summarize
from lmq.model.structure import ModelStructure
from lmq.report import (
    PairedDifference,
    ReportData,
    StageTiming,
    build_report,
    embedded_files,
    model_card,
    report_pictures,
)
from lmq.report.results import FULL_PRECISION, UNIFORM, VariantResult, write_results
from lmq.report.results_table import markdown_table
from lmq_tasks.judged import baseline_size, judged_fields
from lmq_tasks.report_inputs import InputsOf
from lmq_tasks.report_tables import model_report, rows_of
from lmq_tasks.stage import Job, JsonDict, library_versions, stage

WARNINGS_FILE = "warnings.txt"
"""What makes measurements of the run unfair, a line each; empty when nothing does."""
CARDS_FOLDER = "cards"
DATA_FOLDER = "data"
"""Holds the data behind every table and figure of the report, as CSV."""
FIGURES_FOLDER = "figures"
"""Holds the report's figures as SVG."""
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@stage("report", version=10, schema="report/1")
def report(job: Job) -> None:
    """Write results.json, report.html with data and figures, summary.md, warnings.txt, allocations, model cards."""
    structures = {name: _structure(job, name) for name in job.config["models"]}
    variants = [_Variant(job, number, item, structures) for number, item in enumerate(job.config["variants"])]
    results = [variant.result for variant in variants]
    write_results(job.output / "results.json", results)
    (job.output / "summary.md").write_text(markdown_table(results))
    for variant in variants:
        if variant.allocation:
            _write_csv(job, variant)
    models = [
        model_report(job, name, structure, _allocations(name, variants)) for name, structure in structures.items()
    ]
    warnings = [f"{model.name}: {warning}\n" for model in models for warning in model.warnings]
    (job.output / WARNINGS_FILE).write_text("".join(warnings))
    data = ReportData(
        run=job.config["run"],
        results=results,
        models=models,
        paired=_paired(variants),
        stages=_stages(job),
        config=job.config["config"],
        versions=library_versions(),
        digests={f"{name} weights": structure.weights_sha256 for name, structure in structures.items()},
    )
    page = build_report(data)
    (job.output / "report.html").write_text(page, encoding="utf-8")
    _write_texts(job.output / DATA_FOLDER, embedded_files(page))
    _write_texts(job.output / FIGURES_FOLDER, {f"{name}.svg": svg for name, svg in report_pictures(data).items()})
    for variant in variants:
        if variant.result.checkpoint is not None:
            card = job.output / card_file(variant.slug)
            card.parent.mkdir(exist_ok=True)
            card.write_text(model_card(data, variant.result), encoding="utf-8")


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def card_file(slug: str) -> str:
    """File of the report that holds the model card of a variant."""
    return f"{CARDS_FOLDER}/{slug}.md"


def _allocations(model: str, variants: Sequence[_Variant]) -> dict[str, list[JsonDict]]:
    own = [variant for variant in variants if variant.item["model"] == model and variant.allocation]
    return {variant.result.label: variant.allocation for variant in own}


class _Variant:
    """One variant's measured windows and allocation, and the record made of them."""

    def __init__(self, job: Job, number: int, item: JsonDict, structures: dict[str, ModelStructure]):
        self.item = item
        self.slug = item["slug"]
        inputs = InputsOf.variant(number)
        self.windows = rows_of(job, inputs.part("evaluation"), "windows.parquet", WINDOWS_SCHEMA)
        self.allocation = rows_of(job, inputs.part("allocation"), "allocation.parquet", ALLOCATION_SCHEMA)
        self.result = self._result(job, inputs, structures.get(item["model"]))

    def _result(self, job: Job, inputs: InputsOf, structure: ModelStructure | None) -> VariantResult:
        evaluation = summarize(self.windows) if self.windows else None
        measured, note = _measured(evaluation)
        item = self.item
        is_reference = item["strategy"] == FULL_PRECISION
        size = _size(job, inputs, structure, self.allocation, is_reference)
        return VariantResult(
            model=item["model"],
            strategy=item["strategy"],
            budget=item["budget"],
            budget_bytes=item["budget_bytes"],
            seconds=_seconds(job, inputs.part("evaluation")),
            checkpoint=None if is_reference or not job.has(inputs.part("checkpoint")) else f"checkpoints/{self.slug}",
            error=item["error"] or note,
            **size,
            **measured,
            **_solution(job, inputs),
            **judged_fields(job, inputs, item),
        )


def _measured(evaluation: Evaluation | None) -> tuple[dict[str, Any], str | None]:
    """Fields of the record that an evaluation gives, and a remark when perplexity is infinite."""
    if evaluation is None:
        return {}, None
    perplexity, kl = evaluation.perplexity, evaluation.kl_divergence
    finite = math.isfinite(perplexity.value)
    fields = {
        "perplexity": perplexity.value if finite else None,
        "perplexity_stderr": perplexity.stderr if finite else None,
        "kl_divergence": kl.value if kl else None,
        "kl_divergence_stderr": kl.stderr if kl else None,
        "kl_p99": evaluation.kl_p99,
        "top1_agreement": evaluation.top1_agreement,
        "protocol": evaluation.protocol,
        "tokens": evaluation.scored_tokens,
    }
    broken = evaluation.broken_window
    where = f", first in the window of tokens {broken.start} to {broken.end}" if broken else ""
    return fields, None if finite else f"perplexity is infinite{where}: the model gives tokens no probability"


def _size(
    job: Job, inputs: InputsOf, structure: ModelStructure | None, allocation: Sequence[JsonDict], is_reference: bool
) -> dict[str, Any]:
    """Sizes of a variant, as far as they are known: of a model that could not be used there are none."""
    if structure is None:
        return {}
    if is_reference:
        size_bytes = structure.parameters * _DTYPE_BYTES[structure.dtype]
        checkpoint_bytes: int | None = size_bytes + structure.other_bytes
    elif allocation:
        size_bytes = sum(row["size_bytes"] for row in allocation)
        manifest = _manifest(job, inputs.part("checkpoint"))
        checkpoint_bytes = manifest.size_bytes if manifest else None
    else:
        return baseline_size(job, inputs.part("evaluation"), structure)
    return {
        "size_bytes": size_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "bits_per_weight": 8 * size_bytes / structure.parameters,
        "predicted_bytes": size_bytes + structure.other_bytes,
    }


def _solution(job: Job, inputs: InputsOf) -> dict[str, Any]:
    if not job.has(inputs.part("allocation")):
        return {}
    solution = json.loads(job.input(inputs.part("allocation"), "solution.json").read_text())
    names = ("objective", "lower_bound", "gap", "validation_divergence", "uniform_validation_divergence")
    return {name: solution.get(name) for name in names}


def _manifest(job: Job, name: str) -> Any:
    if not job.has(name):
        return None
    ref = job.ref(name)
    return job.store.manifest(ref.stage, ref.key)


def _seconds(job: Job, name: str) -> float | None:
    manifest = _manifest(job, name)
    return manifest.seconds if manifest else None


def _structure(job: Job, model: str) -> ModelStructure:
    return ModelStructure.from_json(
        json.loads(job.input(InputsOf.model(model).part("structure"), "structure.json").read_text())
    )


def _paired(variants: Sequence[_Variant]) -> list[PairedDifference]:
    """Every variant against uniform at the same budget, window by window."""
    found = []
    for variant in variants:
        baseline = next(
            (
                other
                for other in variants
                if other.item["model"] == variant.item["model"]
                and other.item["budget"] == variant.item["budget"]
                and other.item["strategy"] == UNIFORM
            ),
            None,
        )
        if baseline is None or baseline is variant or not variant.windows or not baseline.windows:
            continue
        difference = paired_difference(variant.windows, baseline.windows)
        if difference.stderr is None:
            continue
        found.append(
            PairedDifference(
                model=variant.item["model"],
                variant=variant.result.label,
                baseline=baseline.result.label,
                difference=difference.value,
                stderr=difference.stderr,
            )
        )
    return found


def _stages(job: Job) -> list[StageTiming]:
    """What every artifact took to make and keeps, and whether this run made it."""
    found = []
    for model in job.config["models"]:
        for ref in job.refs(InputsOf.model(model).part("all")):
            manifest = job.store.manifest(ref.stage, ref.key)
            if manifest is not None:
                state: Literal["ran", "cached"] = "ran" if job.site.states.get(ref.uri) == "ran" else "cached"
                found.append(
                    StageTiming(
                        stage=ref.stage,
                        label=model,
                        state=state,
                        seconds=manifest.seconds,
                        size_bytes=manifest.size_bytes,
                        peak_memory_bytes=manifest.peak_memory_bytes,
                    )
                )
    return found


def _write_csv(job: Job, variant: _Variant) -> None:
    with (job.output / f"allocation-{variant.slug}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(variant.allocation[0]))
        writer.writeheader()
        writer.writerows(variant.allocation)
