"""The most memory that a stage's process held while the stage ran, where that can be told.

The system keeps one high-water mark per process. It can be set back (Linux), so a stage that has its process to itself
gets its own peak. Where stages share a process as threads, no number would be that of one stage: it is not known.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_SET_BACK = Path("/proc/self/clear_refs")
_MARK = "VmHWM:"

_lock = threading.Lock()
_watching: set[PeakMemory] = set()


class PeakMemory:
    """Watches the process while a stage runs inside it; nothing is known where others ran beside it."""

    def __init__(self) -> None:
        self._alone = False

    def __enter__(self) -> PeakMemory:
        with _lock:
            for other in _watching:
                other._alone = False
            self._alone = not _watching and _set_back()
            _watching.add(self)
        return self

    def read(self) -> int | None:
        """The peak so far, None where it is not known."""
        with _lock:
            return _high_water() if self._alone else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _watching.discard(self)


def _set_back() -> bool:
    """Set the high-water mark to what the process holds now; whether the system did."""
    try:
        _SET_BACK.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(_MARK)), None)
