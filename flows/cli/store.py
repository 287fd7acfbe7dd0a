"""`lmq store`: what is in a store and for which run, what is damaged, and removing what no run needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.arguments import add_command, add_store, at_least
from lmq_flows.cli.terminal import console, say
from lmq_storage.housekeeping import Contents, collect_garbage, list_contents
from lmq_storage.verify import verify

if TYPE_CHECKING:
    from lmq_storage import ArtifactStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions of `lmq store` with their arguments."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    ls = add_command(actions, "ls", "list what is there by run and by stage, with its size")
    ls.set_defaults(command=ls_command)
    check = add_command(actions, "verify", "read every byte and name what is damaged")
    check.set_defaults(command=verify_command)
    gc = add_command(actions, "gc", "remove what the newest runs do not need")
    gc.add_argument(
        "--keep-runs",
        type=at_least(0),
        default=3,
        metavar="N",
        help="newest runs to keep, beside all that are in progress (default: %(default)s)",
    )
    gc.add_argument(
        "--keep-hours",
        type=at_least(0, float),
        default=24.0,
        metavar="H",
        help="keep artifacts younger than this many hours (default: %(default)s)",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.set_defaults(command=gc_command)
    for each in (ls, check, gc):
        add_store(each, "directory or URL of the store")


def ls_command(arguments: argparse.Namespace) -> int:
    """List what the store holds by run and by stage."""
    contents = list_contents(_store(arguments))
    console.print(_runs_table(contents))
    stages = Table("Stage", "Artifacts", "Size")
    for stage in contents.stages:
        stages.add_row(stage.stage, str(stage.artifacts), _megabytes(stage.total_bytes))
    console.print(stages)
    if contents.unneeded_artifacts:
        say(
            f"{contents.unneeded_artifacts} artifacts belong to no run that this store knows: "
            f"{_megabytes(contents.unneeded_bytes)}, which `lmq store gc` removes once they are old enough"
        )
    return 0


def verify_command(arguments: argparse.Namespace) -> int:
    """Read every byte of the store."""
    damages = verify(_store(arguments))
    for damage in damages:
        say(damage)
    say(f"{len(damages)} damaged" if damages else "every artifact is sound")
    return 1 if damages else 0


def gc_command(arguments: argparse.Namespace) -> int:
    """Remove what the newest runs and those in progress do not need."""
    garbage = collect_garbage(
        _store(arguments),
        keep_runs=arguments.keep_runs,
        keep_hours=arguments.keep_hours,
        dry_run=arguments.dry_run,
    )
    verb = "would remove" if arguments.dry_run else "removed"
    say(f"kept what these runs need: {', '.join(garbage.kept_for) or 'none'}")
    say(f"{verb} {len(garbage.uris)} artifacts, {_megabytes(garbage.freed_bytes)}")
    if garbage.leftovers:
        say(f"{verb} {garbage.leftovers} files left by processes that died or by artifacts that are gone")
    return 0


def _runs_table(contents: Contents) -> Table:
    table = Table("Run", "State", "Age", "Artifacts", "Size", "Its own", "Shared")
    for item in contents.runs:
        missing = f" ({item.missing} missing)" if item.missing else ""
        table.add_row(
            item.run.name,
            item.run.state,
            _age(item.age_s),
            f"{item.artifacts}{missing}",
            _megabytes(item.total_bytes),
            _megabytes(item.own_bytes),
            _megabytes(item.total_bytes - item.own_bytes),
        )
    return table


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _store(arguments: argparse.Namespace) -> ArtifactStore:
    from lmq_tasks.stage import open_store

    if "://" not in arguments.store and not Path(arguments.store).is_dir():
        raise InputError(f"there is no store {arguments.store}; pass --store DIRECTORY or URL")
    return open_store(arguments.store)
