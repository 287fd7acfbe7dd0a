"""What `lmq store` does: say what is in a store and for which run, what is damaged, and remove what nobody needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.terminal import console
from lmq_storage import ArtifactStore
from lmq_storage.housekeeping import Contents, collect_garbage, list_contents, verify
from lmq_tasks.stage import open_store


def ls_command(arguments: argparse.Namespace) -> int:
    """List what the store holds by run and by stage."""
    contents = list_contents(_store(arguments))
    console.print(_runs_table(contents))
    stages = Table("Stage", "Artifacts", "Size")
    for stage in contents.stages:
        stages.add_row(stage.stage, str(stage.artifacts), _megabytes(stage.total_bytes))
    console.print(stages)
    if contents.unneeded_artifacts:
        console.print(
            f"{contents.unneeded_artifacts} artifacts are of no run that is known here: "
            f"{_megabytes(contents.unneeded_bytes)}, which `lmq store gc` removes once they are old",
            highlight=False,
        )
    return 0


def verify_command(arguments: argparse.Namespace) -> int:
    """Read every byte of the store."""
    damages = verify(_store(arguments))
    for damage in damages:
        console.print(damage, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(damages)} damaged" if damages else "every artifact is sound")
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
    console.print(f"kept what these runs need: {', '.join(garbage.kept_for) or 'none'}", highlight=False, markup=False)
    console.print(f"{verb} {len(garbage.uris)} artifacts, {_megabytes(garbage.freed_bytes)}", highlight=False)
    if garbage.leftovers:
        console.print(f"{verb} {garbage.leftovers} leftovers of dead processes and of what is gone", highlight=False)
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
    if "://" not in arguments.store and not Path(arguments.store).is_dir():
        raise InputError(f"there is no store {arguments.store}; pass --store DIRECTORY or URL")
    return open_store(arguments.store)
