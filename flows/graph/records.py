"""Where Prefect keeps its notes of finished tasks: in the store, as plain JSON, read with suspicion.

A record of Prefect's names the serializer that reads it, and pickle is one of them: whoever can write to a shared
store could run code on every machine that reads it. So a record is handed to Prefect only if it is exactly what our
tasks write, a reference to an artifact in plain JSON; anything else counts as missing, and the task runs.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from prefect.filesystems import WritableFileSystem
from prefect.serializers import JSONSerializer
from prefect.settings import get_current_settings
from pydantic import Field

from lmq_flows.config.names import slug
from lmq_storage import ArtifactRef, StoreError
from lmq_storage.files import StoreFiles
from lmq_storage.names import checked_name


class ArtifactRecords(WritableFileSystem):
    """Prefect block for the records of one store. Prefect calls its methods with `_sync`, whichever kind they are."""

    _block_type_name = "lmq artifact records"
    _block_type_slug = "lmq-artifact-records"

    store_url: str = Field(description="Directory or URL of the store; keys of the storage belong in the environment")

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        """A record. Raises FileNotFoundError when there is none, and StoreError for one that Prefect must not read."""
        content = _files(self.store_url).read(_record_path(path))
        if not is_plain_record(content):
            raise StoreError(f"{_record_path(path)} in {self.store_url} is no record that lmq wrote and was not read")
        return content

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:  # type: ignore[override]
        """Write a record whole; returns its path."""
        _files(self.store_url).write(_record_path(path), content)
        return path

    def _resolve_path(self, path: str) -> None:
        """Asked by Prefect of a block that no server knows; None: keys are not paths of this machine."""


def record_storage(store_url: str) -> ArtifactRecords:
    """Prefect's storage block for the records of a store, known to the server that is in use."""
    return _saved_block(store_url, get_current_settings().api.url)


@functools.lru_cache(maxsize=8)
def _saved_block(store_url: str, server: str | None) -> ArtifactRecords:
    block = ArtifactRecords(store_url=store_url)
    block.save(f"lmq-{slug(store_url)[-40:].strip('-.').replace('.', '-')}", overwrite=True)
    return block


def is_plain_record(content: bytes) -> bool:
    """Whether a record holds a reference to an artifact and asks for Prefect's own JSON serializer, nothing else."""
    try:
        record = json.loads(content)
        result = json.loads(record["result"], object_pairs_hook=_without_repeats)
        ArtifactRef.from_json(result)
        serializer: Any = record["metadata"]["serializer"]
    except (ValueError, KeyError, TypeError, StoreError):
        return False
    plain = all(isinstance(value, str) for value in result.values())
    return plain and serializer == JSONSerializer().model_dump(mode="json")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _record_path(path: str) -> str:
    return f"records/{checked_name(path)}"


@functools.lru_cache(maxsize=8)
def _files(store_url: str) -> StoreFiles:
    return StoreFiles(store_url)
