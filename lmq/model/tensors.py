"""The tensors of a safetensors checkpoint, found by their headers and read one at a time."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from lmq.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of a model's tensors, by the name that safetensors gives them."""


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
    """Files that hold a model's weights, in the order in which transformers looks for them.

    That is what `transformers_weights` in config.json names, else `model.safetensors`, else the shards of its index:
    an index that was left beside a newer single file counts for nothing. Raises InputError for a directory that has
    none of them, and for a missing shard.
    """
    named = _named_in_config(model_dir)
    if named is not None and not (model_dir / named).is_file():
        raise InputError(f"{model_dir} lacks {named}, which its config.json names as its weights; download it")
    name = named or next((name for name in (SINGLE_FILE, INDEX_FILE) if (model_dir / name).is_file()), None)
    if name is None:
        raise InputError(f"{model_dir} holds no {SINGLE_FILE} and no {INDEX_FILE}{_instead(model_dir)}")
    return _shards(model_dir, name) if name.endswith(".index.json") else (model_dir / name,)


def _named_in_config(model_dir: Path) -> str | None:
    """`transformers_weights` of config.json. Raises InputError for a name that is not a file of the model."""
    try:
        name = json.loads((model_dir / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # a configuration that cannot be read is refused where it is needed
    if name is not None and (not stays_inside(name) or not name.endswith((".safetensors", ".safetensors.index.json"))):
        raise InputError(
            f"{model_dir}/config.json names {name!r} as its weights, which is not a safetensors file of it"
        )
    return name


def _shards(model_dir: Path, index_name: str) -> tuple[Path, ...]:
    index = model_dir / index_name
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not an index of safetensors shards; download the model again") from error
    leaving = [name for name in shards if not stays_inside(name)]
    if leaving:
        raise InputError(f"{index} names {leaving[0]!r}, which is not a file of the model; download the model again")
    missing = [name for name in shards if not (model_dir / name).is_file()]
    if missing:
        raise InputError(f"{model_dir} lacks {len(missing)} of {len(shards)} shards ({missing[0]}, ...); download them")
    return tuple(model_dir / name for name in shards)


def stays_inside(name: object) -> bool:
    """Whether a shard's name is that of a file in the model's directory, not elsewhere."""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _instead(model_dir: Path) -> str:
    """What the directory holds in their place, and what to do with it."""
    others = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if others:
        return (
            f", only {others[0]}, which transformers does not look for either; rename it to {SINGLE_FILE}, "
            "or give the directory its index"
        )
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


def size_bytes(tensor: StoredTensor) -> int:
    """Data bytes of a stored tensor."""
    bits = re.search(r"\d+", tensor.dtype)  # F32, BF16, U8, F8_E4M3; BOOL takes a byte
    return tensor.elements * (int(bits[0]) if bits else 8) // 8


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
