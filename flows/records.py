"""Where Prefect keeps its records of finished tasks: beside the artifacts they are of."""

from __future__ import annotations

import functools
from typing import Any

from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.settings import get_current_settings

from lmq_flows.names import slug


def record_storage(store_url: str) -> Any:
    """Prefect's storage block for the records of a store, known to the server that is in use."""
    return _saved_block(store_url, get_current_settings().api.url)


@functools.lru_cache(maxsize=8)
def _saved_block(store_url: str, server: str | None) -> Any:
    name = f"lmq-{slug(store_url)[-40:].strip('-.').replace('.', '-')}"
    kind: Any = RemoteFileSystem if "://" in store_url else LocalFileSystem
    block = kind(basepath=f"{store_url}/records")
    block.save(name, overwrite=True)
    return block
