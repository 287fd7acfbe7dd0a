"""The tensors of a safetensors checkpoint, found by their headers and read one at a time."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from lmq.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says: `shape`, and `dtype` as safetensors writes it (`BF16`)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(model_dir: Path) -> tuple[Path, ...]:
    """Files that hold a model's weights: the shards of its index, or its single file.

    Raises InputError for a directory without safetensors, and for a missing shard.
    """
    index = model_dir / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index} is not an index of safetensors shards; download the model again") from error
        leaving = [name for name in shards if not _stays_inside(name)]
        if leaving:
            raise InputError(f"{index} names {leaving[0]!r}, which is no file of the model; download the model again")
        missing = [name for name in shards if not (model_dir / name).is_file()]
        if missing:
            raise InputError(
                f"{model_dir} lacks {len(missing)} of {len(shards)} shards ({missing[0]}, ...); download them"
            )
        return tuple(model_dir / name for name in shards)
    if (model_dir / SINGLE_FILE).is_file():
        return (model_dir / SINGLE_FILE,)
    found = tuple(sorted(model_dir.glob("*.safetensors")))
    if not found:
        raise InputError(f"{model_dir} holds no *.safetensors file{_instead(model_dir)}")
    return found


def _stays_inside(name: object) -> bool:
    """Whether a shard's name is that of a file in the model's directory, not elsewhere."""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _instead(model_dir: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern))
    if pickles:
        return (
            f", only {pickles[0]}: pickled weights can run code when they are opened and are not read; "
            "save the model again with save_pretrained, or download its safetensors revision"
        )
    ggufs = sorted(model_dir.glob("*.gguf"))
    return f"; to use its GGUF file, pass {ggufs[0]}" if ggufs else "; is this a model directory?"


def read_headers(model_dir: Path) -> dict[str, StoredTensor]:
    """Every stored tensor of a model directory by name; raises as `weight_files` and `headers_of`."""
    return headers_of(weight_files(model_dir))


def headers_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every stored tensor by name, from the headers only.

    Raises InputError for a truncated or damaged file, and for a tensor that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    if name in tensors:
                        raise InputError(f"{file} and {tensors[name].file.name} both hold {name}; download them again")
                    header = handle.get_slice(name)
                    tensors[name] = StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or damaged ({error}); download or convert it again") from error
    return tensors


def find_tensor(headers: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """The stored tensor of a model's tensor: checkpoints of base models leave out the first part of the name."""
    return headers.get(name) or headers.get(name.partition(".")[2])


def read_tensors(tensors: Iterable[StoredTensor]) -> dict[str, torch.Tensor]:
    """Read tensors by stored name, as stored. Each is backed by the file's pages until it is converted."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for tensor in tensors:
        by_file[tensor.file].append(tensor.name)
    values: dict[str, torch.Tensor] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as handle:
            values.update({name: handle.get_tensor(name) for name in names})
    return values
