"""Is a checkpoint what was written? By its headers, which is quick, and on request by the sha256 of everything in it.

`checksums.json` in a checkpoint holds the dtype, shape and sha256 of every tensor, and the sha256 of every file beside
the weights (README.md, which runs add afterwards, and files that users add are not named). It is a file of its own, as
safetensors writes the entries of its metadata in an arbitrary order. Checkpoints without it, of earlier versions or
saved by `save_pretrained`, are checked by their headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lmq.checkpoint.config import QUANT_METHOD, LmqConfig
from lmq.errors import DamagedFile, InputError
from lmq.formats.packed_layer import quantized_tensor_shapes
from lmq.model.directory import CHECKSUMS_FILE, write_json
from lmq.model.tensors import (
    INDEX_FILE,
    StoredTensor,
    read_headers,
    read_tensors,
    size_bytes,
    stays_inside,
    weight_files,
)

DTYPE_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
"""Types of quantized tensors, as safetensors writes them."""

_ALGORITHM = "sha256"


def read_quantization_config(path: Path) -> LmqConfig:
    """The `quantization_config` of a checkpoint. Raises InputError if it is not an lmq checkpoint."""
    fields = read_config(path).get("quantization_config")
    if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{path} is not a checkpoint written by lmq: its config.json has no lmq quantization_config")
    try:
        return LmqConfig.from_dict(fields)
    except TypeError as error:
        raise DamagedFile(f"{path / 'config.json'} has a damaged quantization_config: {error}") from error
    except DamagedFile as error:
        raise DamagedFile(f"{path / 'config.json'}: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises InputError where there is none, DamagedFile if it is not JSON."""
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{directory} has no config.json; is it a model directory?") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{directory / 'config.json'} is not JSON: {error}; write or download it again") from error
    if not isinstance(config, dict):
        raise DamagedFile(f"{directory / 'config.json'} does not hold a JSON object; write or download it again")
    return config


def verify_checkpoint(path: Path, *, checksums: bool = False) -> None:
    """Raise DamagedFile or InputError, naming file and tensor, for the first damage that `find_damage` finds."""
    for damage in find_damage(path, checksums=checksums):
        raise DamagedFile(f"{damage}; write or download the checkpoint again")


def find_damage(path: Path, *, checksums: bool = True) -> Iterator[str]:
    """Every damage of a checkpoint: quantized tensors that are missing or of another shape or type than the
    configuration says, an index that does not fit the shards, and, with `checksums`, what differs from checksums.json
    where there is one.

    Raises InputError or DamagedFile where it cannot be read far enough: no checkpoint, an unknown format version, a
    missing shard, a truncated file.
    """
    config = read_quantization_config(path)
    tensors = read_headers(path)
    found = [*_quantized_damage(path, config, tensors), *_index_damage(path, tensors)]
    yield from found
    if checksums and (recorded := read_checksums(path)) is not None:
        yield from _file_damage(path, recorded["files"])
        yield from _tensor_damage(path, tensors, recorded["tensors"])


def check_quantized_tensors(config: LmqConfig, tensors: Mapping[str, StoredTensor], place: Path) -> None:
    """Raise DamagedFile naming the first quantized tensor that is not as the configuration says."""
    for damage in _quantized_damage(place, config, tensors):
        raise DamagedFile(f"{damage}; write or download the checkpoint again")


@dataclass(frozen=True, kw_only=True)
class CheckpointSizes:
    """Bytes of the files of a checkpoint; they add up to what its directory takes.

    `quantized_bytes` are what the solver counts, `header_bytes` the headers of the weight files, `other_bytes` every
    other file: configuration, index, checksums, tokenizer, card.
    """

    quantized_bytes: int
    unquantized_bytes: int
    header_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return self.quantized_bytes + self.unquantized_bytes + self.header_bytes + self.other_bytes


def checkpoint_sizes(path: Path) -> CheckpointSizes:
    """Sizes of a checkpoint from the headers of its files. Raises as `read_quantization_config` and `read_headers`."""
    tensors = read_headers(path)
    data_bytes = sum(size_bytes(tensor) for tensor in tensors.values())
    quantized = quantized_bytes(path)
    weights = set(weight_files(path))
    weight_bytes = sum(file.stat().st_size for file in weights)
    others = (file for file in path.rglob("*") if file.is_file() and file not in weights)
    return CheckpointSizes(
        quantized_bytes=quantized,
        unquantized_bytes=data_bytes - quantized,
        header_bytes=weight_bytes - data_bytes,
        other_bytes=sum(file.stat().st_size for file in others),
    )


def quantized_bytes(path: Path) -> int:
    """Data bytes of the quantized tensors of a checkpoint, from the headers of its files."""
    config, tensors = read_quantization_config(path), read_headers(path)
    check_quantized_tensors(config, tensors, path)
    return sum(size_bytes(tensors[name]) for name in expected_tensors(config))


def expected_tensors(config: LmqConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every quantized tensor that a checkpoint of this configuration holds, by name."""
    shapes = config.shapes
    return {
        f"{module_path}.{name}": (DTYPE_NAMES[dtype], shape)
        for module_path, spec in config.specs.items()
        for name, (shape, dtype) in quantized_tensor_shapes(spec, *shapes[module_path]).items()
    }


def tensor_record(tensor: StoredTensor, value: torch.Tensor) -> dict[str, Any]:
    """What checksums.json holds of a tensor."""
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), _ALGORITHM: hashlib.sha256(data).hexdigest()}


def write_checksums(directory: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write checksums.json: records of the tensors, and digests of the files that lie in `directory` beside them."""
    weights = set(weight_files(directory))
    others = (file for file in directory.rglob("*") if file.is_file() and file not in weights)
    files = {file.relative_to(directory).as_posix(): _digest(file) for file in others}
    write_json(directory / CHECKSUMS_FILE, {"algorithm": _ALGORITHM, "files": files, "tensors": tensors})


def read_checksums(path: Path) -> dict[str, dict[str, Any]] | None:
    """The `files` and `tensors` of checksums.json; None where a checkpoint has none. Raises DamagedFile."""
    file = path / CHECKSUMS_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{file} is not JSON: {error}; remove it to go without checksums") from error
    if isinstance(content, dict) and content.get("algorithm") == _ALGORITHM:
        parts = {name: content.get(name) for name in ("files", "tensors")}
        digests = {name: part for name, part in parts.items() if isinstance(part, dict)}
        if len(digests) == len(parts):
            return digests
    raise DamagedFile(f"{file} does not hold {_ALGORITHM} digests of files and tensors; remove it to go without")


def _quantized_damage(path: Path, config: LmqConfig, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for name, (dtype, shape) in expected_tensors(config).items():
        tensor = tensors.get(name)
        if tensor is None:
            yield f"{path} lacks the tensor {name}"
        elif (tensor.dtype, tensor.shape) != (dtype, shape):
            yield (
                f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)} where its configuration needs "
                f"{dtype} {list(shape)}"
            )


def _index_damage(path: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    index = path / INDEX_FILE
    if index.is_file():
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            if name not in tensors or tensors[name].file != path / shard:
                yield f"{path / shard} lacks the tensor {name}, which {INDEX_FILE} says it holds"


def _file_damage(path: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in recorded.items():
        file = path / name
        if not stays_inside(name) or not file.is_file():
            yield f"{file} is missing"
        elif _digest(file) != digest:
            yield f"{file} is not what was written: its {_ALGORITHM} differs"


def _tensor_damage(path: Path, tensors: Mapping[str, StoredTensor], recorded: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(recorded.keys() - tensors.keys()):
        yield f"{path} lacks the tensor {name}"
    for name, tensor in sorted(tensors.items()):
        if name not in recorded:
            yield f"{tensor.file}: {name} is a tensor that {CHECKSUMS_FILE} does not name"
            continue
        try:
            value = read_tensors([tensor])[name]
        except (SafetensorError, OSError) as error:
            yield f"{tensor.file}: {name} cannot be read: {error}"
            continue
        if tensor_record(tensor, value) != recorded[name]:
            yield f"{tensor.file}: {name} is not what was written: its {_ALGORITHM}, type or shape differs"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHM).hexdigest()
