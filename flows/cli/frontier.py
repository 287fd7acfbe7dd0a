"""`lmq frontier`: many budgets solved from the measurements of one finished run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lmq_flows.cli.arguments import add_number
from lmq_flows.cli.terminal import console, run_directory, say

if TYPE_CHECKING:
    from lmq_flows.studies.frontier import RunFrontier

_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq frontier`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run (runs/demo), or its name")
    add_number(parser, "--points", 100, "budgets to solve", least=2)
    parser.add_argument(
        "--strategy",
        default="loss-aware",
        help="strategy whose costs are minimized, as the run's table names it (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="NAME", help="one of the run's models (default: all)")
    parser.add_argument(
        "--target",
        metavar="ENGINE",
        help="plan over what an engine holds of the run's menu, as in gptq; costs stay those of the run's own codes",
    )
    parser.set_defaults(command=frontier_command)


def frontier_command(arguments: argparse.Namespace) -> int:
    """Solve many budgets of every model of a run, or of one, and draw predicted cost against bytes."""
    from lmq_flows.studies.frontier import FinishedRun

    run_dir = run_directory(arguments.run)
    run = FinishedRun.open(run_dir)
    for model in [arguments.model] if arguments.model else run.models:
        found = run.frontier(model, arguments.strategy, arguments.points, arguments.target)
        console.print(_table(found))
        for path in _write(found, run_dir):
            say(path)
    return 0


def _write(found: RunFrontier, run_dir: Path) -> tuple[Path, Path]:
    from lmq.report.figures.frontier import frontier_figures
    from lmq.report.figures.standalone import standalone_svg
    from lmq_flows.config.names import slug
    from lmq_flows.studies.frontier import write_points

    name = f"frontier-{slug(found.model)}" + ("" if found.target is None else f"-for-{slug(found.target)}")
    table, picture = (run_dir / f"{name}.{ending}" for ending in ("csv", "svg"))
    write_points(table, found)
    figures = frontier_figures(
        found.points,
        found.uniform,
        found.results,
        model=found.model,
        strategy=found.strategy,
        costs_are_divergences=found.costs_are_divergences,
    )
    picture.write_text(standalone_svg(figures), encoding="utf-8")
    return table, picture


def _table(found: RunFrontier) -> Table:
    """Evenly spaced points of the frontier, the first and the last among them."""
    target = "" if found.target is None else f" for {found.target}"
    table = Table(title=f"{found.model}: {found.strategy}{target}, {len(found.points)} budgets", title_justify="left")
    unit = " (nats per token)" if found.costs_are_divergences else ""
    for header in ("Budget", "Bits/weight", "Unused", f"Predicted cost{unit}", "Gap at most"):
        table.add_column(header, justify="right")
    last = len(found.points) - 1
    for index in sorted({round(row * last / (_ROWS - 1)) for row in range(_ROWS)}):
        point = found.points[index]
        table.add_row(
            f"{point.budget_bytes:,} B",
            f"{8 * point.size_bytes / found.structure.parameters:.3f}",
            f"{point.budget_bytes - point.size_bytes:,} B",
            f"{point.objective:.5g}",
            f"{point.gap:.1e}",
        )
    return table
