"""`lmq plan`: what a run would do, without running anything."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.table import Table

from lmq_flows.cli.arguments import add_config
from lmq_flows.cli.run import load_config, print_notes
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq_flows.graph.explain import PlannedNode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq plan`."""
    add_config(parser)
    parser.add_argument("--layers", action="store_true", help="one line per layer instead of per stage")
    parser.set_defaults(command=plan_command)


def plan_command(arguments: argparse.Namespace) -> int:
    """Print what a run would do."""
    from lmq_flows.run.plan import plan_run

    plan = plan_run(load_config(arguments))
    print_notes(plan.notes)
    _print_plan(plan.nodes, by_layer=arguments.layers)
    for name in plan.to_convert:
        say(f"{name} is converted or equalized first; once that is done, `lmq plan` shows the rest")
    for problem in plan.problems:
        say(f"would fail: {problem}", style="yellow")
    return 0


def _print_plan(planned: list[PlannedNode], by_layer: bool) -> None:
    table = Table("Stage", "For", "To run", "Cached", "Keeps", "Why")
    groups: dict[tuple[str, str, str], list[PlannedNode]] = defaultdict(list)
    for item in planned:
        what = item.node.label if by_layer else item.node.subject
        groups[item.node.stage.name, what, _stage_reason(item, by_layer)].append(item)
    for (stage, what, reason), items in groups.items():
        cached = sum(item.cached for item in items)
        sizes = [item.size_bytes for item in items if item.size_bytes is not None]
        size = f"{sum(sizes) / 1e6:,.1f} MB" if sizes else "–"
        table.add_row(stage, what, str(len(items) - cached), str(cached), size, reason)
    console.print(table)


def _stage_reason(item: PlannedNode, by_layer: bool) -> str:
    return item.reason if by_layer else item.reason.partition(" layer ")[0].removesuffix(" will be made")
