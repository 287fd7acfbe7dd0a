"""Data sets, of the hub or in a folder, through `datasets`, identified by their content.

`dataset:ORG/NAME[@REVISION][/CONFIG][:SPLIT]` is one of the hub, `dataset:FOLDER[:SPLIT]` one of this machine.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pyarrow as pa

from lmq.errors import InputError
from lmq.text.rows import text_column, texts_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "dataset:"
_SPLIT = r"(:(?P<split>[\w\[\]:%+-]+))?"
_HUB = re.compile(rf"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.-]+))?(/(?P<config>[\w.-]+))?{_SPLIT}")
_FOLDER = re.compile(rf"(?P<folder>[^:]+){_SPLIT}")
_LONGEST_REASON = 300
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set by its name on the hub or its folder; `revision` and `config` are None for a folder."""

    name: str
    split: str
    revision: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, source: str) -> DataSet:
        """Read `dataset:…`; a folder that is there goes before the hub. Raises InputError."""
        text = source.removeprefix(PREFIX)
        folder = _FOLDER.fullmatch(text)
        if folder is not None and Path(folder["folder"]).expanduser().is_dir():
            path = Path(folder["folder"]).expanduser().absolute()
            return cls(name=str(path), split=folder["split"] or "train")
        hub = _HUB.fullmatch(text)
        if hub is None:
            raise InputError(
                f"{source!r} does not name a data set; write dataset:ORG/NAME[@REVISION][/CONFIG][:SPLIT], or "
                "dataset:FOLDER[:SPLIT] for a folder that is there"
            )
        return cls(name=hub["name"], split=hub["split"] or "train", revision=hub["revision"], config=hub["config"])

    @property
    def is_folder(self) -> bool:
        """Whether it lies on this machine."""
        return Path(self.name).is_absolute()

    @property
    def source(self) -> str:
        """As `parse` reads it, wherever it is read."""
        revision = f"@{self.revision}" if self.revision else ""
        config = f"/{self.config}" if self.config else ""
        return f"{PREFIX}{self.name}{revision}{config}:{self.split}"


def identify_data_set(source: str) -> tuple[str, str]:
    """What a data set's content is known by, and the source that reads that very content.

    Of a folder the digest of its files, of the hub the commit that its revision is now. Raises InputError where the
    hub does not say and no copy is here.
    """
    found = DataSet.parse(source)
    if found.is_folder:
        return f"dataset@{folder_digest(Path(found.name))}:{found.split}", found.source
    import datasets  # takes seconds

    try:
        builder = datasets.load_dataset_builder(found.name, found.config, revision=found.revision)
    except load_errors() as error:
        raise _not_fetched(source, error) from error
    commit = str(builder.hash)
    pinned = DataSet(
        name=found.name,
        split=found.split,
        config=found.config,
        revision=commit if _COMMIT.fullmatch(commit) else found.revision,
    )
    return f"dataset@{commit}:{found.name}/{found.config or 'default'}:{found.split}", pinned.source


def folder_digest(folder: Path) -> str:
    """Sha256 of the names and bytes of a folder's files, but for hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                digest.update(f"{name.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def read_data_set(source: str, column: str, tokenizer: PreTrainedTokenizerBase | None, *, instead: str) -> list[str]:
    """The texts of a data set. Raises InputError where it cannot be had or read, or holds no text."""
    rows = load_data_set(source, instead)
    column = text_column(rows.column_names, column, source)
    return texts_of_rows(list(rows[column]), column, source, tokenizer)


def load_data_set(source: str, instead: str) -> Any:
    """The rows of a data set, a `datasets.Dataset`. Raises InputError where it cannot be had or read."""
    import datasets  # takes seconds

    found = DataSet.parse(source)
    try:
        rows = datasets.load_dataset(found.name, found.config, split=found.split, revision=found.revision)
        require_commit(rows, found.revision, source)
    except load_errors() as error:
        raise _not_fetched(source, error, instead, is_folder=found.is_folder) from error
    return rows


def require_commit(rows: Any, revision: str | None, source: str) -> None:
    """Raise InputError where `rows` of a data set are of another commit than `revision`.

    Out of reach of the hub, `datasets` gives whatever copy is on the machine, the latest, and only logs that.
    """
    folders = {part for file in rows.cache_files for part in Path(file["filename"]).parts}
    commits = sorted(filter(_COMMIT.fullmatch, folders))
    if revision is not None and _COMMIT.fullmatch(revision) and commits and revision not in commits:
        raise InputError(
            f"{source} is on this machine at commit {commits[0]}, not at {revision}; fetch it once with a network"
        )


def load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises where the hub is out of reach, a file is damaged, or a split or a loader is missing."""
    import datasets.exceptions

    return (
        OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, zlib.error, lzma.LZMAError,
        httpx.HTTPError, pa.ArrowException, datasets.exceptions.DatasetsError,
    )  # fmt: skip


def _not_fetched(source: str, error: Exception, instead: str = "", *, is_folder: bool = False) -> InputError:
    what = "cannot be read" if is_folder else "could not be fetched from the hub"
    return InputError(f"{source} {what} ({load_failure(error)}){'; ' + instead if instead else ''}")


def load_failure(error: BaseException) -> str:
    """What `datasets` says of the error and of its cause, in one line; of files whose columns differ, the columns."""
    from datasets.table import CastError

    differing = next((part for part in _chain(error) if isinstance(part, CastError)), None)
    if differing is not None:
        there, first = differing.table_column_names, differing.requested_column_names
        more = [name for name in there if name not in first]
        fewer = [name for name in first if name not in there]
        parts = [f"{verb} {', '.join(names)}" for verb, names in (("has", more), ("lacks", fewer)) if names]
        return f"its files differ in their columns: one {' and '.join(parts)}, unlike the first"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    said = str(error).strip().partition("\n")[0], textwrap.shorten(str(cause), _LONGEST_REASON)
    return "; ".join(filter(None, dict.fromkeys(said)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
