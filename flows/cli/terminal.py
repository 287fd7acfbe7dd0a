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


def say(text: str | Path, style: str | None = None) -> None:
    """Print a line as it is, wrapped by the terminal alone, so that paths can be copied."""
    console.print(str(text), style=style, highlight=False, markup=False, soft_wrap=True)


def run_directory(run: Path) -> Path:
    """Directory of a run given as a directory or by its name. Raises InputError for anything else, naming the runs."""
    for place in (run, _RUNS / run):
        if (place / _RESULTS).is_file():
            return place
    if run.is_file():
        raise InputError(f"{run} is a file, not the directory of a run{_runs_here()}")
    if run.is_dir():
        raise InputError(
            f"{run} is not the directory of a finished run: it has no {_RESULTS}, which `lmq run` writes{_runs_here()}"
        )
    raise InputError(f"there is no run {str(run)!r}, neither as a directory nor by name in {_RUNS}{_runs_here()}")


def _runs_here() -> str:
    names = sorted(path.parent.name for path in _RUNS.glob(f"*/{_RESULTS}"))
    if not names:
        return ""
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"; runs here: {', '.join(names[:_MOST_NAMED])}{rest}"
