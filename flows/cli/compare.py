"""`lmq compare`: checkpoints side by side, on the same text."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.arguments import add_store
from lmq_flows.cli.evaluate import add_judging, format_score, model_directory, task_scores
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq.evaluation.performance import Performance
    from lmq.evaluation.side_by_side import ComparedModel
    from lmq.evaluation.task_scores import TaskScore

_PERFORMANCE = (
    "memory_resident_bytes",
    "peak_generation_bytes",
    "prompt_tokens_per_second",
    "generation_tokens_per_second",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq compare`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="DIR_OR_MODEL",
        help="directories of checkpoints (of lmq or any other that transformers opens), hub ids, .gguf files",
    )
    parser.add_argument(
        "--reference", metavar="DIR_OR_MODEL", help="what KL divergence and top-1 are measured against (default: first)"
    )
    add_judging(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    form.add_argument("--json", action="store_true", help="print every figure as JSON; null is not measured")
    parser.add_argument("--no-samples", action="store_true", help="do not let the models write a few words")
    add_store(parser, "where a converted model is kept")
    parser.set_defaults(command=compare_command, continued_list="models")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What is shown of one model; None is not measured."""

    name: str
    is_reference: bool
    found: ComparedModel
    performance: Performance | None
    scores: list[TaskScore]
    sample: str | None

    @property
    def notes(self) -> list[str]:
        """What was not measured, and why."""
        notes = [self.found.note] if self.found.note else []
        notes += [f"failed: {self.found.error}"] if self.found.error else []
        return notes + [f"{score.task} {format_score(score)}" for score in self.scores if score.error]


def compare_command(arguments: argparse.Namespace) -> int:
    """Judge every model on the same text and print one table; 1 when one of them could not be judged."""
    from lmq.evaluation.side_by_side import compare_models
    from lmq_flows.run.prepare import check_window

    names = [arguments.reference or arguments.models[0], *arguments.models]
    twice = next((name for name in arguments.models if arguments.models.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice; name every model once")
    directories = {name: model_directory(name, arguments.store) for name in dict.fromkeys(names)}
    for path in directories.values():
        check_window(path, arguments.window, "--window")
    with Console(stderr=True).status("starting") as status:
        found = compare_models(
            [directories[name] for name in arguments.models],
            directories[names[0]],
            lambda path: status.update(f"judging {path}"),
            text=arguments.text,
            column=arguments.column,
            tokens=arguments.tokens,
            window=arguments.window,
            stride=arguments.stride,
        )
        rows = [
            _row(name, names[0], model, arguments, status.update) for name, model in zip(names[1:], found, strict=True)
        ]
    if arguments.json:
        print(
            json.dumps(
                {"reference": names[0], "text": arguments.text, "models": [_plain(row) for row in rows]},
                indent=2,
                allow_nan=False,
            )
        )
    else:
        _print_table(rows, names[0], markdown=arguments.markdown)
    failed = any(row.found.error or any(score.error for score in row.scores) for row in rows)
    return 1 if failed else 0


def _row(
    name: str, reference: str, found: ComparedModel, arguments: argparse.Namespace, tell: Callable[[str], None]
) -> _Row:
    """A judged model with what else was asked for."""
    from lmq.evaluation.performance import measure_performance
    from lmq_flows.run.samples import samples

    written, performance, scores = None, None, []
    if found.error is None:
        tell(f"asking {name}")
        written = None if arguments.no_samples else samples([found.path])
        scores = task_scores(found.path, arguments.tasks, arguments.limit)
        performance = measure_performance(found.path, threads=arguments.threads) if arguments.performance else None
    return _Row(
        name=name,
        is_reference=name == reference,
        found=found,
        performance=performance,
        scores=scores,
        sample=written[0] if written else None,
    )


def _print_table(rows: Sequence[_Row], reference: str, *, markdown: bool) -> None:
    """The table with its notes and samples, for the terminal or in Markdown."""
    from lmq.report.results_table import markdown_rows
    from lmq_flows.run.samples import PROMPT

    headers, cells = _cells(rows)
    if markdown:
        say(markdown_rows(headers, cells, texts=headers[:1]))
    else:
        table = Table(*headers)
        for column in table.columns[1:]:
            column.justify = "right"
        for texts in cells:
            table.add_row(*texts)
        console.print(table)
    bullet = "- " if markdown else ""
    if not any(row.is_reference for row in rows):
        say(f"{bullet}reference: {reference}")
    for host in dict.fromkeys(row.performance.host for row in rows if row.performance):
        say(f"{bullet}measured on {host}")
    for row in rows:
        for note in row.notes:
            say(f"{bullet}{row.name}: {note}")
    if any(row.sample is not None for row in rows):
        say(f"\n{PROMPT!r} goes on\n")
        width = max(len(row.name) for row in rows)
        for row in rows:
            said = (
                "not tried: it is not sure to fit this machine's free memory"
                if row.sample is None
                else repr(row.sample)
            )
            say(f"{bullet or '  '}{row.name:<{width}} {said}")


def _cells(rows: Sequence[_Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and text of the table, without columns that nobody asked for."""
    from lmq.report.results import NOT_MEASURED, format_bytes, format_measured, format_number, format_percent

    def measured(show: Callable[[Any], str]) -> Callable[[_Row], str]:
        return lambda row: NOT_MEASURED if row.found.evaluation is None else show(row.found.evaluation)

    def divergence(row: _Row) -> str:
        if row.is_reference:
            return "reference"
        return measured(lambda found: _estimate(found.kl_divergence, 4))(row)

    def performance(show: Callable[[Performance], str]) -> Callable[[_Row], str]:
        return lambda row: NOT_MEASURED if row.performance is None else show(row.performance)

    def score(task: str) -> Callable[[_Row], str]:
        return lambda row: next(
            (format_score(each) for each in row.scores if each.task == task and not each.error), NOT_MEASURED
        )

    def _estimate(found: Any, decimals: int) -> str:
        return NOT_MEASURED if found is None else format_measured(found.value, found.stderr, decimals=decimals)

    protocols = sorted({row.found.evaluation.protocol for row in rows if row.found.evaluation})
    columns: dict[str, Callable[[_Row], str]] = {
        "Model": lambda row: row.name,
        "On disk": lambda row: format_bytes(row.found.disk_bytes),
        f"Perplexity ({', '.join(protocols)})": measured(lambda found: _estimate(found.perplexity, 2)),
        "KL to reference": divergence,
        "Top-1": measured(lambda found: format_percent(found.top1_agreement)),
    }
    if any(row.performance for row in rows):
        columns |= {
            "Resident": performance(lambda found: format_bytes(found.memory_resident_bytes)),
            "Peak generating": performance(lambda found: format_bytes(found.peak_generation_bytes)),
            "Prompt tokens/s": performance(lambda found: format_number(found.prompt_tokens_per_second, 1)),
            "Generated tokens/s": performance(lambda found: format_number(found.generation_tokens_per_second, 1)),
        }
    columns |= {task: score(task) for task in dict.fromkeys(each.task for row in rows for each in row.scores)}
    return list(columns), [[text(row) for text in columns.values()] for row in rows]


def _plain(row: _Row) -> dict[str, Any]:
    """A row for JSON; what was not measured, or is not finite, is null."""
    found = row.found.evaluation
    divergence = None if found is None else found.kl_divergence
    return {
        "model": row.name,
        "path": str(row.found.path),
        "disk_bytes": row.found.disk_bytes,
        "perplexity": None if found is None or not math.isfinite(found.perplexity.value) else found.perplexity.value,
        "perplexity_stderr": None if found is None else found.perplexity.stderr,
        "kl_divergence": None if divergence is None else divergence.value,
        "kl_divergence_stderr": None if divergence is None else divergence.stderr,
        "kl_p99": None if found is None else found.kl_p99,
        "top1_agreement": None if found is None else found.top1_agreement,
        "protocol": None if found is None else found.protocol,
        "tokens": None if found is None else found.scored_tokens,
        **{name: getattr(row.performance, name, None) for name in _PERFORMANCE},
        "performance_host": getattr(row.performance, "host", None),
        "tasks": [asdict(score) for score in row.scores],
        "sample": row.sample,
        "notes": row.notes,
    }
