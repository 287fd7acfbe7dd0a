"""`lmq run`: a configuration from measuring to the report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmq_flows.cli.arguments import add_config
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq_flows.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq run`."""
    add_config(parser)
    parser.add_argument(
        "--runner", choices=("threads", "dask", "ray"), help="what runs the stages (overrides the key runner.kind)"
    )
    parser.set_defaults(command=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    """Run a configuration to the end and print its table."""
    from lmq_flows.run.own_server import begin_own_server

    begin_own_server()
    from lmq_flows.cli.report import print_table
    from lmq_flows.run.plan import check_run
    from lmq_flows.run.quantize import SOME_VARIANTS_FAILED, raise_failure, run

    config = load_config(arguments)
    print_notes(check_run(config))
    console.print(f"run [bold]{config.name}[/bold]: starting Prefect, then the stages", highlight=False)
    started = time.monotonic()
    state = run(config)
    if not state.is_completed() and state.name != SOME_VARIANTS_FAILED:
        raise_failure(state)
    print_table(config.run_dir)
    console.print(f"{time.monotonic() - started:.0f} s")
    say(config.run_dir / "report.html")
    return 0 if state.is_completed() else 1


def load_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that was asked for, with all overrides."""
    from lmq_flows.config.run import load_run_config, preset_names, preset_path

    path = Path(arguments.config)
    if not path.exists() and arguments.config in preset_names():
        path = preset_path(arguments.config)
    given = {"target": arguments.target, "runner.kind": getattr(arguments, "runner", None)}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    return load_run_config(path, (*arguments.overrides, *options))


def print_notes(notes: Sequence[str]) -> None:
    """Print what the user should know before work starts."""
    for note in notes:
        say(f"note: {note}")
