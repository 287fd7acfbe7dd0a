"""Which process made something, and whether it still lives: told without any clock."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path

_TOKEN = re.compile(r"(?P<place>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start>\d+)")


SILENT_AFTER_S = 3600.0
"""A process of another machine that gave no sign of life for so long counts as gone."""


def process_token() -> str:
    """Text that identifies this process: where it runs, its number, and when after boot it started."""
    return f"{_place()}-{os.getpid()}-{_start_ticks(os.getpid())}"


def is_alive(text: str) -> bool | None:
    """Whether the process of the token that `text` begins with lives; None when it ran on another machine."""
    match = _TOKEN.match(text)
    if match is None or match["place"] != _place():
        return None
    pid = int(match["pid"])
    return _exists(pid) and _start_ticks(pid) == int(match["start"])


def counts_as_alive(text: str, silent_s: float) -> bool:
    """Whether to take the process of the token that `text` begins with for alive.

    On its own machine the system tells; of another machine's process it counts how long it gave no sign of life.
    """
    alive = is_alive(text)
    return silent_s < SILENT_AFTER_S if alive is None else alive


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


@functools.cache
def _place() -> str:
    """This start of this machine, and the name space that process numbers have their meaning in (a container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot, space = platform.node(), ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:12]


def _start_ticks(pid: int) -> int:
    """Clock ticks from boot to the start of a process, which tells it from a later one of the same number.

    0 where the system does not say, -1 for a process that has ended and was not waited for.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if state in "ZX" else int(numbers[18])
