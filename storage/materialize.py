"""Directories of an artifact's files under their own names, for programs that open directories."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from lmq_storage.processes import is_alive, process_token

_COPY_BELOW_BYTES = 1 << 20


def lay_out(files: Mapping[str, Path], copies: Mapping[str, Path], directory: Path) -> None:
    """Make `directory` hold `files` (hard links where possible) and `copies`, by name; it appears whole."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory)
    partial = _beside(directory)
    try:
        for name, file in files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file, target)
        for name, file in copies.items():
            shutil.copyfile(file, partial / name)
        _replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_abandoned(directory: Path) -> None:
    """Remove what processes that died while laying out `directory` left beside it."""
    prefix = f".{directory.name}."
    for path in directory.parent.glob(f"{prefix}*"):
        if is_alive(path.name.removeprefix(prefix)) is False:
            shutil.rmtree(path, ignore_errors=True)


def _beside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{process_token()}-{uuid.uuid4().hex[:8]}")


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= _COPY_BELOW_BYTES:
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:
            pass  # another file system, or one without links
    shutil.copyfile(source, target)


def _replace_directory(partial: Path, directory: Path) -> None:
    """Put `partial` where `directory` is; a reader sees the old or the new one."""
    if directory.exists():
        old = _beside(directory)
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)
