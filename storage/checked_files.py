"""Local files whose digest was checked, so that each is read whole only once per process while it does not change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lmq_storage.artifact import StoredFile


class CheckedFiles:
    """Remembers size and modification time of every file that had the right digest."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[int, int]] = {}

    def matches(self, path: Path, file: StoredFile) -> bool:
        """Whether a local file has the bytes that were published; remembered while size and mtime stay."""
        try:
            state = _state(path)
            if state[0] != file.size_bytes:
                return False
            if self._states.get(str(path)) == state:
                return True
            if file_sha256(path) != file.sha256:
                return False
        except FileNotFoundError:
            return False
        self._states[str(path)] = state
        return True

    def remember(self, path: Path) -> None:
        """Take note of a file that was just written with the right bytes."""
        self._states[str(path)] = _state(path)

    def forget(self, path: Path) -> None:
        """Drop what is known of a file, which is about to go."""
        self._states.pop(str(path), None)

    def clear(self) -> None:
        """Drop everything: the next look at any file reads it again."""
        self._states.clear()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
