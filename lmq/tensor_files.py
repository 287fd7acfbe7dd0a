"""Safetensors files and sharded directories of them, read by their headers; tensors are loaded one by one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lmq.errors import DamagedFile, InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `dtype` as safetensors names it (`BF16`)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    def load(self) -> torch.Tensor:
        """Read the tensor."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises DamagedFile if the file is missing, truncated or not one."""
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        expected_bytes = 8 + header_bytes + end
    except FileNotFoundError as error:
        raise DamagedFile(f"{path} is missing; write or download the checkpoint again") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise DamagedFile(f"{path} is not a safetensors file: {error}; write or download it again") from error
    size_bytes = path.stat().st_size
    if size_bytes != expected_bytes:
        raise DamagedFile(
            f"{path} is {size_bytes:,} bytes where its header says {expected_bytes:,}; write or download it again"
        )
    return {name: _stored_tensor(name, path, entry) for name, entry in header.items()}


def _stored_tensor(name: str, path: Path, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), end - start)


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory, sharded or not.

    Raises InputError if it holds no safetensors weights, DamagedFile for a missing or truncated shard or a tensor
    that is not where the index says.
    """
    if not (directory / INDEX_FILE).is_file():
        if not (directory / WEIGHTS_FILE).is_file():
            raise InputError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; is it a model directory?")
        return read_header(directory / WEIGHTS_FILE)
    try:
        weight_map: dict[str, str] = json.loads((directory / INDEX_FILE).read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{directory / INDEX_FILE} is not readable: {error}; write the checkpoint again") from error
    shards = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    missing = [f"{name} in {file}" for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise DamagedFile(f"{directory}: the index names tensors that are not there: {', '.join(missing[:5])}")
    return {name: shards[file][name] for name, file in weight_map.items()}
