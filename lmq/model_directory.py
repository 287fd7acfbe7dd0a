"""Writing of a model directory: shards of safetensors, the files beside them, all of it or nothing."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lmq.errors import InputError
from lmq.stored_tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, read_tensors

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY.md")


def size_bytes(tensor: StoredTensor) -> int:
    """Data bytes of a stored tensor."""
    bits = re.search(r"\d+", tensor.dtype)  # F32, BF16, U8, F8_E4M3; BOOL takes a byte
    return tensor.elements * (int(bits[0]) if bits else 8) // 8


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


def write_shards(directory: Path, tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> None:
    """Copy tensors, in the order of their names, into one file or into shards with an index."""
    shards = _split(sorted(tensors.values(), key=lambda tensor: tensor.name), max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total_bytes = sum(size_bytes(tensor) for tensor in tensors.values())
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        save_file(read_tensors(shard), directory / file, metadata={"format": "pt"})


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
    """Copy the tokenizer, generation, template, code and licence files of a model directory, and its config.json."""
    for file in sorted(source_dir.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.stem in _COPIED_NAMES or file.name in _COPIED_NAMES
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
