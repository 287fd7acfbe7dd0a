"""Memory of the process that stages run in: freed memory is kept while a task runs, and each stage's peak is measured.

**Freed memory.** A stage allocates tensors of the same sizes again and again. glibc gives memory back to the kernel as
soon as it is free: every tensor of more than 128 KiB at first, and the top of its heap later. The kernel then clears
each page anew before the next tensor has it, which took a third of the time of stages with many small tensors on some
machines. What is kept lies between what is in use, and adds up: the conversion of a GGUF file of 0.5 billion weights
left 1.5 GB. So it is given back at the end of every task.

**Peak.** The system keeps one high-water mark per process. Linux lets us reset it, so a stage that has its process to
itself gets its own peak. Where stages share a process as threads, no number would belong to one stage: it is unknown.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from types import TracebackType

LARGEST_KEPT_BYTES = 32 << 20
"""Tensors up to this size come from the heap; glibc allows no more. Larger ones go back to the kernel when freed."""

KEPT_FREE_BYTES = 256 << 20
"""Free memory at the top of the heap from which on it is given back."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> bool:
    """Tell the C library, once per process, to keep up to 256 MB of freed memory. False where it cannot be told."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows; macOS
        return False
    heap_used = set_option(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    heap_kept = set_option(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    return bool(heap_used and heap_kept)


def give_back_freed_memory() -> None:
    """Let the kernel have the freed memory of the whole heap, where it was kept."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)


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
