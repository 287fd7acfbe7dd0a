"""What commands share: where they print, and how a run is named."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from lmq.errors import InputError

console = Console() if sys.stdout.isatty() else Console(width=140)


_RUNS = Path("runs")
_RESULTS = "results.json"
_MOST_NAMED = 6


def run_directory(run: Path) -> Path:
    """Directory of a run given as a directory or by its name. Raises InputError for anything else, naming the runs."""
    for place in (run, _RUNS / run):
        if (place / _RESULTS).is_file():
            return place
    if run.is_file():
        raise InputError(f"{run} is a file, not the directory of a run{_there_are()}")
    if run.is_dir():
        raise InputError(
            f"{run} is not the directory of a finished run: it has no {_RESULTS}, which `lmq run` writes{_there_are()}"
        )
    raise InputError(f"there is no run {str(run)!r}, neither as a directory nor by name in {_RUNS}{_there_are()}")


def _there_are() -> str:
    names = sorted(path.parent.name for path in _RUNS.glob(f"*/{_RESULTS}"))
    if not names:
        return ""
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"; runs here: {', '.join(names[:_MOST_NAMED])}{rest}"
