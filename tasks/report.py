"""Stage that reports: results.json, report.html, the allocations as CSV, and the pictures for the UI."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lmq.allocation.error_table import ErrorTable
from lmq.evaluation.windows import paired_difference
from lmq.formats.spec import QuantSpec
from lmq.measurement.coarse_grid import CoarseGrid, coarse_grid_warnings
from lmq.measurement.expert_tokens import EXPERT_TOKENS, pooled_experts
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.measurement.registry import COSTS, MEASUREMENTS, PROFILES
from lmq.measurement.super_weights import SUPER_WEIGHTS
from lmq.measurement.weights import KURTOSIS
from lmq.model.structure import ModelStructure, ModuleId
from lmq.outliers import OUTLIERS_SCHEMA
from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.results import UNIFORM, write_results
from lmq.report.results_table import markdown_table
from lmq_tasks.measure import measured_rows
from lmq_tasks.report_variants import InputsOf, ReportedVariant, rows_of
from lmq_tasks.stage import Job, JsonDict, library_versions, stage

WARNINGS_FILE = "warnings.txt"
"""What makes measurements of the run unfair, a line each; empty when nothing does."""
CARDS_FOLDER = "cards"
DATA_FOLDER = "data"
"""Holds the data behind every table and figure of the report, as CSV."""
FIGURES_FOLDER = "figures"
"""Holds the report's figures as SVG."""


@stage("report", version=12, schema="report/1")
def report(job: Job) -> None:
    """Write results.json, report.html with data and figures, summary.md, warnings.txt, allocations, model cards."""
    from lmq.report.page import build_report  # with matplotlib, which no other stage needs
    from lmq.report.sections.card import model_card
    from lmq.report.sections.downloads import embedded_files
    from lmq.report.sections.pictures import report_pictures

    structures = {name: _structure(job, name) for name in job.config["models"]}
    variants = [ReportedVariant(job, number, item, structures) for number, item in enumerate(job.config["variants"])]
    results = [variant.result for variant in variants]
    write_results(job.output / "results.json", results)
    (job.output / "summary.md").write_text(markdown_table(results))
    for variant in variants:
        if variant.allocation:
            _write_csv(job, variant)
    models = [
        _model_report(job, name, structure, _allocations(name, variants)) for name, structure in structures.items()
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


def _structure(job: Job, model: str) -> ModelStructure:
    return ModelStructure.from_json(
        json.loads(job.input(InputsOf.model(model).part("structure"), "structure.json").read_text())
    )


def _model_report(
    job: Job, name: str, structure: ModelStructure, allocations: Mapping[str, list[JsonDict]]
) -> ModelReport:
    """What was measured of the model `name`; `allocations` are rows by the label of their variant."""
    inputs = InputsOf.model(name)
    rows = {measurement: measured_rows(job, measurement, inputs.part(measurement)) for measurement in MEASUREMENTS}
    statistics = rows[KURTOSIS.name]
    costs = {
        column.name: _cost_table(rows[cost.name], column.column) for cost in COSTS.values() for column in cost.columns
    }
    frobenius = costs["frobenius"]
    return ModelReport(
        name=name,
        structure=structure,
        profiles={profile: rows[profile] for profile in PROFILES},
        outliers=rows_of(job, inputs.part("outliers"), "outliers.parquet", OUTLIERS_SCHEMA),
        super_weights=rows[SUPER_WEIGHTS.name],
        layer_activity=rows[LAYER_ACTIVITY.name],
        costs={cost: table for cost, table in costs.items() if table is not None},
        allocations=allocations,
        warnings=[
            *(_coarse_grid_warnings(job, name, statistics, frobenius.specs) if frobenius else []),
            *pooled_experts(rows[EXPERT_TOKENS.name]),
        ],
    )


def _cost_table(rows: Sequence[JsonDict], column: str) -> ErrorTable | None:
    """The column as a table; None where it was not measured, or not of every module."""
    whole = bool(rows) and all(row[column] is not None for row in rows)
    return ErrorTable.from_rows(rows, column) if whole else None


def _coarse_grid_warnings(job: Job, name: str, statistics: Sequence[JsonDict], menu: Sequence[QuantSpec]) -> list[str]:
    """Sentences about measured configurations that the source's own quantization makes unfair."""
    if not statistics:
        return []
    coarse_grids = {
        ModuleId(row["layer"], row["kind"]): row["grid_bits"] and CoarseGrid(row["grid_bits"], row["grid_group_size"])
        for row in statistics
    }
    ref = job.refs(InputsOf.model(name).part(FROBENIUS.name))[0]
    manifest = job.store.manifest(ref.stage, ref.key)
    axis = manifest.config["quantizer"]["axis"] if manifest else 1
    return coarse_grid_warnings(coarse_grids, sorted(menu), axis=axis)


def _allocations(model: str, variants: Sequence[ReportedVariant]) -> dict[str, list[JsonDict]]:
    own = [variant for variant in variants if variant.item["model"] == model and variant.allocation]
    return {variant.result.label: variant.allocation for variant in own}


def _paired(variants: Sequence[ReportedVariant]) -> list[PairedDifference]:
    """Every variant against uniform at the same budget, window by window."""
    differences = []
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
        differences.append(
            PairedDifference(
                model=variant.item["model"],
                variant=variant.result.label,
                baseline=baseline.result.label,
                difference=difference.value,
                stderr=difference.stderr,
            )
        )
    return differences


def _stages(job: Job) -> list[StageTiming]:
    """What every artifact took to make and keeps, and whether this run made it."""
    timings = []
    for model in job.config["models"]:
        for ref in job.refs(InputsOf.model(model).part("all")):
            manifest = job.store.manifest(ref.stage, ref.key)
            if manifest is not None:
                state: Literal["ran", "cached"] = "ran" if job.site.states.get(ref.uri) == "ran" else "cached"
                timings.append(
                    StageTiming(
                        stage=ref.stage,
                        label=model,
                        state=state,
                        seconds=manifest.seconds,
                        size_bytes=manifest.size_bytes,
                        peak_memory_bytes=manifest.peak_memory_bytes,
                    )
                )
    return timings


def _write_csv(job: Job, variant: ReportedVariant) -> None:
    with (job.output / f"allocation-{variant.slug}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(variant.allocation[0]))
        writer.writeheader()
        writer.writerows(variant.allocation)
