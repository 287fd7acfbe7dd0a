"""Export as a plain model: the quantized values as dense weights, in safetensors, for any program.

The directory is that of a model that was never quantized: `config.json` without `quantization_config`, the companions
of the checkpoint, and `model.safetensors` or its shards. It is as large as the model in `dtype`; what is kept is the
quantized model's behaviour, not its size. The error of the step is the rounding of the weights to `dtype`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from lmq.checkpoint.write import DEFAULT_MAX_SHARD_BYTES
from lmq.export.dtypes import cast, dtype_name, parse_dtype, with_dtype
from lmq.export.report import ExportReport, ModuleStep, directory_bytes, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.model.directory import complete_directory, copy_companions, write_json
from lmq.model.structure import expert_number
from lmq.model.tensors import FLOAT_TYPES, INDEX_FILE, StoredTensor, read_tensors, size_bytes

_STORED_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Empty: every checkpoint of lmq can be written as a plain model."""
    return []


def export(
    checkpoint: QuantizedCheckpoint,
    target: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> ExportReport:
    """Write the directory `target`; peak memory is one shard of at most `max_shard_bytes`.

    `dtype` "float16", "bfloat16" or "float32" is that of every float tensor. None keeps the unquantized tensors bit for
    bit and gives the quantized matrices the type that most of them have. Raises InputError where `target` exists, for
    another dtype, and naming a tensor that holds values which `dtype` cannot.
    """
    model = _DenseModel(checkpoint, parse_dtype(dtype) if dtype is not None else None)
    with complete_directory(target) as directory:
        _write_shards(directory, model, max_shard_bytes)
        copy_companions(checkpoint.path, directory)
        write_json(directory / "config.json", with_dtype(checkpoint.model_config, model.matrix_dtype))
    return ExportReport(path=target, size_bytes=directory_bytes(target), steps=model.steps)


class _DenseModel:
    """The tensors of the plain model, each made when it is read; keeps the step of every matrix that was read."""

    def __init__(self, checkpoint: QuantizedCheckpoint, dtype: torch.dtype | None):
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._matrices = {f"{path}.weight": path for path in checkpoint.specs if expert_number(path) is None}
        self._experts = _joined(checkpoint)
        self.matrix_dtype = dtype or checkpoint.dtype
        self.steps: dict[str, ModuleStep] = {}

    def headers(self) -> dict[str, StoredTensor]:
        """Shape and type of every tensor by name, in the order of the names."""
        stored_as = _STORED_NAMES[self.matrix_dtype]
        headers = {
            name: StoredTensor(self._checkpoint.path, name, self._checkpoint.shapes[path], stored_as)
            for name, path in self._matrices.items()
        }
        for name, paths in self._experts.items():
            rows, columns = self._checkpoint.shapes[paths[0]]
            shape = (columns, rows) if self._are_transposed(name) else (rows, columns)
            headers[name] = StoredTensor(self._checkpoint.path, name, (len(paths), *shape), stored_as)
        for name, tensor in self._checkpoint.unquantized.items():
            is_cast = self._dtype is not None and tensor.dtype in FLOAT_TYPES
            headers[name] = replace(tensor, dtype=stored_as) if is_cast else tensor
        return dict(sorted(headers.items()))

    def read(self, name: str) -> Tensor:
        """One tensor as it is written."""
        if name in self._matrices:
            return self._read_matrix(name, self._matrices[name])
        if name in self._experts:
            matrices = [self._read_matrix(name, path) for path in self._experts[name]]
            joined = torch.stack(matrices)
            return joined.transpose(1, 2).contiguous() if self._are_transposed(name) else joined
        return cast(read_tensors([self._checkpoint.unquantized[name]])[name], self._dtype, name)

    def _are_transposed(self, name: str) -> bool:
        experts: Any = self._checkpoint.model_tensors.model.get_submodule(name.rpartition(".")[0])
        return experts.transposed

    def _read_matrix(self, name: str, path: str) -> Tensor:
        weight = self._checkpoint.weight(path)
        written = cast(weight, self.matrix_dtype, name)
        self.steps[path] = ModuleStep(
            target=dtype_name(self.matrix_dtype), relative_error=relative_error(written, weight)
        )
        return written


def _joined(checkpoint: QuantizedCheckpoint) -> dict[str, list[str]]:
    """Paths of the experts' matrices, by number, for each parameter in which transformers holds them together."""
    joined: dict[str, list[str]] = {}
    for path in sorted(checkpoint.specs, key=lambda path: expert_number(path) or 0):
        if expert_number(path) is not None:
            experts, _, name = path.rsplit(".", 2)
            joined.setdefault(f"{experts}.{name}", []).append(path)
    return joined


def _write_shards(directory: Path, model: _DenseModel, max_shard_bytes: int) -> None:
    split = split_state_dict_into_shards_factory(
        model.headers(),
        get_storage_size=size_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: model.read(name) for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(directory / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
