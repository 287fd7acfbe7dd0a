"""`lmq strategies`: how allocations can be chosen."""

from __future__ import annotations

import argparse

from rich.table import Table

from lmq_flows.cli.terminal import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`lmq strategies` takes no arguments."""
    parser.set_defaults(command=strategies_command)


def strategies_command(arguments: argparse.Namespace) -> int:
    """List the strategies."""
    from lmq.allocation.strategies import STRATEGIES, strategy

    table = Table("Strategy", "What it does", "Source", "Measures")
    for name in STRATEGIES:
        item = strategy(name)
        table.add_row(name, item.summary, item.source, ", ".join(sorted(item.needs)) or "nothing")
    console.print(table)
    return 0
