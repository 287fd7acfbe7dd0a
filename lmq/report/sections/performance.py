"""Memory, speed and zero-shot scores of every variant, where they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lmq.evaluation.task_scores import TaskScore
from lmq.report.html import Cell, Column, csv_link, not_measured, number, table, text
from lmq.report.results import VariantResult, format_bytes, format_number, format_percent

_MEMORY = ("memory_resident_bytes", "peak_generation_bytes")
_SPEED = ("prompt_tokens_per_second", "generation_tokens_per_second")


def performance_part(results: Sequence[VariantResult], several_models: bool) -> str:
    """What the opened model takes and how fast it generates, beside what was predicted and what lies on disk."""
    measured = [r for r in results if any(getattr(r, name) is not None for name in (*_MEMORY, *_SPEED))]
    if not measured:
        return f"<h3>Memory and speed</h3>{not_measured('Memory and speed')}"
    columns = [
        *_names(several_models),
        Column("Weights, predicted", True, "by the plan, unquantized tensors included"),
        Column("On disk", True, "the whole checkpoint directory"),
        Column("Opened", True, "resident memory that the opened model adds to its process"),
        Column("Peak, generating", True, "the most that it adds while it generates"),
        Column("Prompt tokens/s", True),
        Column("Generated tokens/s", True),
    ]
    sizes = ("predicted_bytes", "checkpoint_bytes", *_MEMORY)
    rows = [
        [
            *_named(result, several_models),
            *(number(format_bytes(getattr(result, name)), getattr(result, name)) for name in sizes),
            *(number(format_number(getattr(result, name), 1), getattr(result, name)) for name in _SPEED),
        ]
        for result in measured
    ]
    hosts = sorted({result.performance_host for result in measured if result.performance_host})
    note = f'<p class="note">Each in a process of its own: {escape("; ".join(hosts))}.</p>' if hosts else ""
    return f"<h3>Memory and speed</h3>{table(columns, rows, 'Memory and speed')}{note}"


def tasks_part(results: Sequence[VariantResult], several_models: bool) -> str:
    """Scores of the zero-shot tasks, a column for every task and metric, and why a task has none."""
    scores = {index: result.tasks for index, result in enumerate(results) if result.tasks}
    if not scores:
        return f"<h3>Zero-shot tasks</h3>{not_measured('Zero-shot tasks')}"
    names = list(dict.fromkeys(_name(one) for own in scores.values() for one in own if one.error is None))
    samples = {_name(one): one.samples for own in scores.values() for one in own if one.samples is not None}
    hints = {name: f"{samples[name]:,} questions" if name in samples else "" for name in names}
    columns = [*_names(several_models), *(Column(name, True, hints[name]) for name in names)]
    rows = []
    for index, own in scores.items():
        by_name = {_name(one): one for one in own}
        rows.append([*_named(results[index], several_models), *(_score(by_name.get(name)) for name in names)])
    header = ["model", "variant", "task", "metric", "value", "stderr", "samples", "error"]
    data = (
        (results[i].model, results[i].label, s.task, s.metric, s.value, s.stderr, s.samples, s.error)
        for i, own in scores.items()
        for s in own
    )
    counts = ", ".join(f"{name} {samples[name]:,}" for name in names if name in samples)
    link = csv_link("tasks.csv", header, data)
    failed = sorted({f"{one.task}: {one.error}" for own in scores.values() for one in own if one.error})
    missing = "".join(f"<li>{escape(words)}</li>" for words in failed)
    said = f"<p>Not measured:</p><ul>{missing}</ul>" if missing else ""
    note = f'<p class="note">± is one standard error over questions. Questions: {escape(counts)}. {link}</p>'
    return f"<h3>Zero-shot tasks</h3>{table(columns, rows, 'Zero-shot tasks')}{note}{said}"


def _names(several_models: bool) -> list[Column]:
    return [Column("Variant"), *([Column("Model")] if several_models else [])]


def _named(result: VariantResult, several_models: bool) -> list[Cell]:
    return [text(result.label), *([text(result.model)] if several_models else [])]


def _name(score: TaskScore) -> str:
    return f"{score.task} {score.metric}" if score.metric else score.task


def _score(score: TaskScore | None) -> Cell:
    if score is None or score.value is None:
        return number("", None)
    shown = format_percent(score.value)
    if score.stderr is not None:
        shown += f" ± {format_percent(score.stderr)}"
    return number(shown, score.value)
