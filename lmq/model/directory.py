"""Writing of a model directory: shards of safetensors, the files beside them, all of it or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from lmq.errors import InputError
from lmq.model.companions import companion_files
from lmq.model.tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, read_tensors, size_bytes

Record = TypeVar("Record")

CHECKSUMS_FILE = "checksums.json"


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` that gets its name when the block ends well, and is removed otherwise."""
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as parent:
        directory = Path(parent) / path.name
        directory.mkdir()
        yield directory
        directory.rename(path)


def write_shards(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    max_shard_bytes: int,
    *,
    record: Callable[[StoredTensor, torch.Tensor], Record] | None = None,
) -> dict[str, Record]:
    """Copy tensors, in the order of their names, into one file or into shards with an index.

    Returns what `record` makes of each, from the values that were read and not from what reached the disk.
    """
    shards = _split(sorted(tensors.values(), key=lambda tensor: tensor.name), max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total_bytes = sum(size_bytes(tensor) for tensor in tensors.values())
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    records: dict[str, Record] = {}
    for file, shard in zip(files, shards, strict=True):
        values = read_tensors(shard)
        save_file(values, directory / file, metadata={"format": "pt"})
        if record is not None:
            records.update({tensor.name: record(tensor, values[tensor.name]) for tensor in shard})
    return records


def _split(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + size_bytes(tensor) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += size_bytes(tensor)
    return shards


def copy_companions(source_dir: Path, directory: Path) -> None:
    """Copy what comes with a model's weights (`lmq.model.companions`), its config.json among it, as files."""
    for file in companion_files(source_dir):
        target = directory / file.relative_to(source_dir)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
