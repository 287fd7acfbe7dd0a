"""What any process found to have the right bytes, kept in a file: to ask whether an artifact is there reads no bytes.

A line says of a blob, by its name, the size, modification time and inode that it had when it was read whole, or `-`
when it was found damaged; the last line of a name counts. Lines are appended in one write each. Whoever works with the
bytes still reads them whole first (`CheckedFiles`): bytes that rot while size and time stay are noticed there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_DAMAGED = "-"
_LINES_BEFORE_REWRITE = 10_000


class CheckRecord:
    """The record of a store's local files in the file `path`, shared with other processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._states: dict[str, str] = {}
        self._read: tuple[int, int] = (0, 0)
        """Inode of the file that `_states` are from, and how many of its bytes were read."""

    def holds(self, blob: Path) -> bool:
        """Whether the file had the right bytes when it was last read, and is the same by size, time and inode."""
        self._read_further()
        try:
            return self._states.get(blob.name) == _state(blob)
        except FileNotFoundError:
            return False

    def add(self, blob: Path) -> None:
        """Note that the file has the right bytes."""
        with suppress(FileNotFoundError):  # removed this moment
            self._append(blob.name, _state(blob))

    def drop(self, blob: Path) -> None:
        """Note that the file has not the right bytes, where it was said to have."""
        self._read_further()
        if self._states.get(blob.name, _DAMAGED) != _DAMAGED:
            self._append(blob.name, _DAMAGED)

    def _append(self, name: str, state: str) -> None:
        with suppress(OSError), self._path.open("ab", buffering=0) as stream:  # a store that may only be read has none
            stream.write(f"{name} {state}\n".encode())

    def _read_further(self) -> None:
        """Read what was appended since the last time, by this process or another."""
        try:
            status = self._path.stat()
        except OSError:
            return
        inode, offset = self._read
        if inode != status.st_ino or offset > status.st_size:
            self._states, offset = {}, 0
        if offset == status.st_size:
            return
        with self._path.open("rb") as stream:
            stream.seek(offset)
            text = stream.read()
        complete = text.rfind(b"\n") + 1
        lines = text[:complete].decode(errors="replace").splitlines()
        self._states |= {name: state for name, _, state in (line.partition(" ") for line in lines)}
        self._read = status.st_ino, offset + complete
        if len(lines) > _LINES_BEFORE_REWRITE + 2 * len(self._states):
            self._rewrite()

    def _rewrite(self) -> None:
        """Leave one line a name. A line that another process appends meanwhile is lost: its file is read once more."""
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            partial.write_text("".join(f"{name} {state}\n" for name, state in self._states.items()))
            partial.replace(self._path)


def _state(blob: Path) -> str:
    status = blob.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
