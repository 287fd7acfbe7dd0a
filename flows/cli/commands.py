"""What each command of `lmq` does."""

from __future__ import annotations

import argparse
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lmq.errors import InputError, LmqError
from lmq.report.compare import seeded_draws
from lmq.report.results import read_results
from lmq.report.results_table import is_number_column, latex_table, markdown_table, results_table
from lmq_flows.cli.terminal import console, run_directory
from lmq_flows.config.run import RunConfig, load_run_config, preset_names, preset_path
from lmq_flows.graph.explain import PlannedNode
from lmq_storage import StoreError
from lmq_tasks.reporting import WARNINGS_FILE

_HEADER_WIDTH = 10
"""Longer headers of the results table are broken into lines, so that it fits a terminal."""


def run_command(arguments: argparse.Namespace) -> int:
    """Run a configuration to the end and print its table."""
    from lmq_flows.run.plan import check_run
    from lmq_flows.run.quantize import SOME_VARIANTS_FAILED, run

    config = _load(arguments)
    _print_notes(check_run(config))
    console.print(f"run [bold]{config.name}[/bold]: starting Prefect, then the stages", highlight=False)
    started = time.monotonic()
    state = run(config)
    if not state.is_completed() and state.name != SOME_VARIANTS_FAILED:
        return _explain_failure(state)
    _print_table(config.run_dir)
    console.print(f"{time.monotonic() - started:.0f} s")
    console.print(str(config.run_dir / "report.html"), highlight=False, soft_wrap=True)
    return 0 if state.is_completed() else 1


def _explain_failure(state) -> int:  # type: ignore[no-untyped-def]
    """Raise what stopped the flow, so that it ends as one message and an exit code."""
    result = state.result(raise_on_failure=False)
    if isinstance(result, LmqError | StoreError | OSError | KeyboardInterrupt):
        raise result
    raise LmqError(f"the run failed: {state.message}; `prefect server start` shows the trace of the flow run")


def plan_command(arguments: argparse.Namespace) -> int:
    """Print what a run would do."""
    from lmq_flows.run.plan import plan_run

    plan = plan_run(_load(arguments))
    _print_notes(plan.notes)
    _print_plan(plan.nodes, by_layer=arguments.layers)
    for name in plan.to_convert:
        console.print(f"{name} is converted first; what follows is planned once that is done", highlight=False)
    for problem in plan.problems:
        console.print(f"would fail: {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return 0


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def report_command(arguments: argparse.Namespace) -> int:
    """Print the tables of finished runs and the path of their report; several are compared on a page of their own."""
    directories = [run_directory(run) for run in arguments.run]
    for directory in directories:
        results = read_results(directory / "results.json")
        if len(directories) > 1:
            console.print(f"[bold]{directory.name}[/bold]", highlight=False)
        if arguments.markdown or arguments.latex:
            text = latex_table(results) if arguments.latex else markdown_table(results)
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _print_table(directory)
    page = directories[0] / "report.html" if len(directories) == 1 else _write_comparison(directories, arguments.output)
    missing = "" if page.is_file() else " is missing; `lmq run` of the same configuration writes it again"
    console.print(f"{page}{missing}", highlight=False, soft_wrap=True)
    return 0


def _write_comparison(directories: Sequence[Path], output: Path) -> Path:
    from lmq.report.sections.comparison import build_comparison

    names = [directory.name for directory in directories]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"two runs are called {repeated}; compare runs of different names")
    runs = {directory.name: read_results(directory / "results.json") for directory in directories}
    output.write_text(build_comparison(runs), encoding="utf-8")
    return output


def strategies_command(arguments: argparse.Namespace) -> int:
    """List the strategies."""
    from lmq.allocation.strategies import STRATEGIES, strategy

    table = Table("Strategy", "What it does", "Source", "Measures")
    for name in STRATEGIES:
        item = strategy(name)
        table.add_row(name, item.summary, item.source, ", ".join(sorted(item.needs)) or "nothing")
    console.print(table)
    return 0


def _load(arguments: argparse.Namespace) -> RunConfig:
    path = Path(arguments.config)
    if not path.exists() and arguments.config in preset_names():
        path = preset_path(arguments.config)
    given = {"target": arguments.target, "runner.kind": getattr(arguments, "runner", None)}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_run_config(path, (*arguments.overrides, *options))


def _print_table(run_dir: Path) -> None:
    """One table per model; notes go below it, and below all what makes the measurements unfair."""
    results = read_results(run_dir / "results.json")
    for model in dict.fromkeys(result.model for result in results):
        of_model = [result for result in results if result.model == model]
        headers, rows = results_table(of_model)
        last = headers.index("KL to full precision") + 1
        main = [index for index in range(last) if headers[index] != "Model"]
        console.print(_columns(model, headers, rows, main))
        beside = [index for index in range(last, len(headers)) if headers[index] != "Note"]
        if beside:
            names = [headers.index(name) for name in ("Strategy", "Budget")]
            console.print(_columns(f"{model}: memory, speed and tasks", headers, rows, names + beside))
            hosts = dict.fromkeys(result.performance_host for result in of_model if result.performance_host)
            for host in hosts:
                console.print(f"measured on {host}", highlight=False, markup=False, soft_wrap=True)
        for draws in seeded_draws(of_model):
            figures = f"{draws.mean:.2f}, standard deviation {draws.deviation:.2f}"
            text = f"{draws.strategy} @ {draws.budget}: perplexity of {draws.count} draws on average {figures}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        for result, row in zip(of_model, rows, strict=True):
            if row[-1]:
                console.print(f"{result.label} {row[-1]}", highlight=False, markup=False, soft_wrap=True)
    warnings = run_dir / WARNINGS_FILE
    for warning in warnings.read_text().splitlines() if warnings.is_file() else ():
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _columns(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> Table:
    """Some columns of a table of results, for the terminal."""
    table = Table(title=title, title_justify="left")
    for index in shown:
        words = " ".join(row[index] for row in rows).split()
        is_number = is_number_column(headers[index])
        table.add_column(
            textwrap.fill(headers[index].replace("/", "/ "), _HEADER_WIDTH),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            min_width=max(map(len, words), default=0),
        )
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table


def _print_plan(planned: list[PlannedNode], by_layer: bool) -> None:
    table = Table("Stage", "For", "To run", "Cached", "Keeps", "Why")
    groups: dict[tuple[str, str, str], list[PlannedNode]] = defaultdict(list)
    for item in planned:
        what = item.node.label if by_layer else item.node.label.partition(" layer ")[0]
        groups[item.node.stage.name, what, _stage_reason(item, by_layer)].append(item)
    for (stage, what, reason), items in groups.items():
        cached = sum(item.cached for item in items)
        sizes = [item.size_bytes for item in items if item.size_bytes is not None]
        size = f"{sum(sizes) / 1e6:,.1f} MB" if sizes else "–"
        table.add_row(stage, what, str(len(items) - cached), str(cached), size, reason)
    console.print(table)


def _stage_reason(item: PlannedNode, by_layer: bool) -> str:
    return item.reason if by_layer else item.reason.partition(" layer ")[0].removesuffix(" will be made")
