"""The table of a run's results, as text for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

from lmq.evaluation.task_scores import main_score
from lmq.report.results import (
    FULL_PRECISION,
    NOT_MEASURED,
    VariantResult,
    format_bytes,
    format_difference,
    format_measured,
    format_number,
    format_percent,
    format_used,
    relative_perplexity,
)

Column = Callable[[VariantResult], str]
"""Text of a cell."""


def results_table(results: Sequence[VariantResult]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of text for the terminal, one row per variant in the order given."""
    columns = _table_columns(results)
    return list(columns), [[text(result) for text in columns.values()] for result in results]


def is_number_column(header: str) -> bool:
    """Whether a column of `results_table` holds numbers, to be aligned at the right."""
    return header not in ("Model", "Strategy", "Quantizer", "Budget", "Windows", "Note")


def markdown_table(results: Sequence[VariantResult]) -> str:
    """The same table in Markdown."""
    headers, rows = results_table(results)
    return markdown_rows(headers, rows, texts=[header for header in headers if not is_number_column(header)])


def markdown_rows(headers: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Collection[str]) -> str:
    """A table in Markdown; the columns that are not `texts` are numbers, aligned at the right."""
    alignment = [":---" if header in texts else "---:" for header in headers]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, alignment, *cells]) + "\n"


def latex_table(results: Sequence[VariantResult]) -> str:
    """The same table as a LaTeX tabular with the rules of the booktabs package."""
    headers, rows = results_table(results)
    columns = "".join("r" if is_number_column(header) else "l" for header in headers)
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in [headers, *rows]]
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    escaped = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    signs = {"^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "\n": " "}
    return "".join((escaped | signs).get(char, char) for char in text)


def _table_columns(results: Sequence[VariantResult]) -> dict[str, Column]:
    """Text of every column of the table by its header."""

    def relative(result: VariantResult) -> str:
        if result.strategy == FULL_PRECISION:
            return "reference"
        return format_percent(relative_perplexity(result, results), signed=True)

    return {
        "Model": lambda result: result.model,
        "Strategy": lambda result: result.strategy,
        "Quantizer": lambda result: result.quantizer or NOT_MEASURED,
        "Budget": lambda result: result.budget or NOT_MEASURED,
        "Used of budget": lambda result: format_used(result.size_bytes, result.budget_bytes),
        "Unused": lambda result: format_difference(result.unused_bytes),
        "Bits/weight": lambda result: format_number(result.bits_per_weight, 3),
        "On disk": lambda result: format_bytes(result.checkpoint_bytes),
        **_windows_column(results),
        f"Perplexity{_protocol(results)}": lambda result: format_measured(result.perplexity, result.perplexity_stderr),
        "vs full precision": relative,
        "KL to full precision": lambda result: format_measured(
            result.kl_divergence, result.kl_divergence_stderr, decimals=4
        ),
        **_performance_columns(results),
        **_task_columns(results),
        "Note": _note,
    }


def _protocols(results: Sequence[VariantResult]) -> list[str]:
    return sorted({result.protocol for result in results if result.protocol})


def _protocol(results: Sequence[VariantResult]) -> str:
    """What all perplexities were measured with, for the header."""
    protocols = _protocols(results)
    return f" ({protocols[0]})" if len(protocols) == 1 else ""


def _windows_column(results: Sequence[VariantResult]) -> dict[str, Column]:
    """Where several protocols meet in one table, each row says its own."""
    return {} if len(_protocols(results)) < 2 else {"Windows": lambda result: result.protocol or NOT_MEASURED}


def _performance_columns(results: Sequence[VariantResult]) -> dict[str, Column]:
    """Memory and speed, of those that were measured at all."""
    columns: dict[str, Column] = {
        "Resident": lambda result: format_bytes(result.memory_resident_bytes),
        "Peak generating": lambda result: format_bytes(result.peak_generation_bytes),
        "Prompt tokens/s": lambda result: format_number(result.prompt_tokens_per_second, 1),
        "Generated tokens/s": lambda result: format_number(result.generation_tokens_per_second, 1),
    }
    return {header: text for header, text in columns.items() if any(text(result) != NOT_MEASURED for result in results)}


def _task_columns(results: Sequence[VariantResult]) -> dict[str, Column]:
    """A column for every zero-shot task that any variant has a score of: `piqa acc, n = 1838`."""
    columns: dict[str, Column] = {}
    for task in dict.fromkeys(score.task for result in results for score in result.tasks or ()):
        shown = next((score for result in results if (score := main_score(result.tasks, task))), None)
        if shown is not None:
            columns[f"{task} {shown.metric}, n = {shown.samples}"] = functools.partial(_accuracy, task=task)
    return columns


def _accuracy(result: VariantResult, task: str) -> str:
    score = main_score(result.tasks, task)
    if score is None or score.value is None:
        return NOT_MEASURED
    stderr = "" if score.stderr is None else f" ± {format_percent(score.stderr)}"
    return f"{format_percent(score.value)}{stderr}"


def _note(result: VariantResult) -> str:
    notes = [f"failed: {result.error}"] if result.error else []
    if result.validation_divergence is not None:
        own, uniform = (
            format_number(value, 4) for value in (result.validation_divergence, result.uniform_validation_divergence)
        )
        notes.append(f"KL {own} on validation text, uniform {uniform}")
    notes += [f"{score.task}: {score.error}" for score in result.tasks or () if score.error]
    return "; ".join(notes)
