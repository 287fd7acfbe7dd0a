"""What commands share: where they print, and how a run is named."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

console = Console() if sys.stdout.isatty() else Console(width=140)


def run_directory(run: Path) -> Path:
    """Directory of a run given as a directory or by its name."""
    return run if (run / "results.json").is_file() else Path("runs") / run
