"""`lmq report`: the tables of finished runs, and a page that compares several."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.terminal import console, run_directory, say

_HEADER_WIDTH = 10
"""Longer headers of the results table are broken into lines, so that it fits a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq report`."""
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="directory of a run (runs/demo), or its name")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    form.add_argument("--latex", action="store_true", help="print the table as a LaTeX tabular (booktabs)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("comparison.html"),
        help="page to write when several runs are compared (default: %(default)s)",
    )
    parser.set_defaults(command=report_command)


def report_command(arguments: argparse.Namespace) -> int:
    """Print the tables of finished runs and the path of their report; several are compared on a page of their own."""
    from lmq.report.results import read_results
    from lmq.report.results_table import latex_table, markdown_table

    directories = [run_directory(run) for run in arguments.run]
    for directory in directories:
        results = read_results(directory / "results.json")
        if len(directories) > 1:
            console.print(f"[bold]{directory.name}[/bold]", highlight=False)
        if arguments.markdown or arguments.latex:
            say(latex_table(results) if arguments.latex else markdown_table(results))
        else:
            print_table(directory)
    page = directories[0] / "report.html" if len(directories) == 1 else _write_comparison(directories, arguments.output)
    missing = "" if page.is_file() else " is missing; `lmq run` of the same configuration writes it again"
    say(f"{page}{missing}")
    return 0


def _write_comparison(directories: Sequence[Path], output: Path) -> Path:
    from lmq.report.results import read_results
    from lmq.report.sections.comparison import build_comparison

    names = [directory.name for directory in directories]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"two runs are called {repeated}; compare runs of different names")
    runs = {directory.name: read_results(directory / "results.json") for directory in directories}
    output.write_text(build_comparison(runs), encoding="utf-8")
    return output


def print_table(run_dir: Path) -> None:
    """One table per model, with its notes below; last, what makes the measurements unfair."""
    from lmq.report.compare import seeded_draws
    from lmq.report.results import read_results
    from lmq.report.results_table import results_table
    from lmq_tasks.report import WARNINGS_FILE

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
            for host in dict.fromkeys(result.performance_host for result in of_model if result.performance_host):
                say(f"measured on {host}")
        for draws in seeded_draws(of_model):
            figures = f"{draws.mean:.2f}, standard deviation {draws.deviation:.2f}"
            say(f"{draws.strategy} @ {draws.budget}: mean perplexity of {draws.count} seeds {figures}")
        for result, row in zip(of_model, rows, strict=True):
            if row[-1]:
                say(f"{result.label} {row[-1]}")
    warnings = run_dir / WARNINGS_FILE
    for warning in warnings.read_text().splitlines() if warnings.is_file() else ():
        say(f"warning: {warning}", style="yellow")


def _columns(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> Table:
    """Some columns of a table of results, for the terminal."""
    from lmq.report.results_table import is_number_column

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
