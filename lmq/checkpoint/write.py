"""Quantized checkpoints: a model directory that transformers opens after `import lmq`.

- `config.json`: that of the source plus `quantization_config` (see `lmq.checkpoint.config.LmqConfig`).
- `checksums.json`: digests of every tensor and file (see `lmq.checkpoint.verify`).
- generation, tokenizer, template and licence files of the source, as they are.
- `model.safetensors`, or `model-0000i-of-0000N.safetensors` with `model.safetensors.index.json`. A quantized module
  is `<module path>.codes` (see `lmq.formats.packing`), `.scale_codes`, `.zero_codes`, `.scale_ranges` and
  `.matrix_range` (see `lmq.formats.groups`), together exactly `QuantSpec.size_bytes`; every other tensor is copied bit
  for bit.

The same inputs give the same bytes. A checkpoint is written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmq.checkpoint.config import LmqConfig
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.reopen import check_opens, sample_logits
from lmq.checkpoint.verify import (
    DTYPE_NAMES,
    quantized_bytes,
    read_config,
    read_quantization_config,
    tensor_record,
    verify_checkpoint,
    write_checksums,
)
from lmq.errors import DamagedFile, InputError
from lmq.formats.packed_layer import quantize_weight, quantized_tensor_shapes
from lmq.measurement.embeddings import fit_rows, quantize_rows
from lmq.measurement.grids import Allocation, LayerGrids, fit_grids
from lmq.model.directory import complete_directory, copy_companions, write_json, write_shards
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.stored_matrices import load_layer_weights, stored_matrix
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId
from lmq.model.tensors import StoredTensor, headers_of
from lmq.quantizers import Quantizer

__all__ = [
    "assemble_checkpoint",
    "quantize_layer",
    "quantized_bytes",
    "read_quantization_config",
    "save_layer",
    "verify_checkpoint",
    "write_checkpoint",
]

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


def quantize_layer(
    structure: ModelStructure, weights: Mapping[ModuleId, torch.Tensor], grids: LayerGrids, allocation: Allocation
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of the modules in `weights`, each on its grid of the chosen configuration, on the CPU.

    `weights` [out_features, in_features] each. Raises InputError for a module without a configuration or a grid.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in weights.items():
        grid = grids.get(module, {}).get(allocation[module]) if module in allocation else None
        if grid is None:
            raise InputError(
                f"no grid for {module} at {allocation.get(module, 'no chosen configuration')}; "
                "fit the grids of the whole menu and give every module of the layer a configuration"
            )
        for name, tensor in quantize_weight(weight, grid).items():
            tensors[f"{structure.path(module)}.{name}"] = tensor.cpu()
    return tensors


def quantize_embeddings(
    source_dir: Path, structure: ModelStructure, grids: LayerGrids, allocation: Allocation
) -> dict[str, torch.Tensor]:
    """The same of input embedding and output head, whose weights are read some rows at a time."""
    tensors: dict[str, torch.Tensor] = {}
    for module in structure.embeddings:
        if module.id in allocation:
            stored = quantize_rows(
                stored_matrix(source_dir, structure, module), grids[module.id][allocation[module.id]]
            )
            tensors |= {f"{structure.path(module.id)}.{name}": tensor for name, tensor in stored.items()}
    return tensors


def save_layer(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of `quantize_layer` as one safetensors file."""
    save_file(dict(tensors), path)


def assemble_checkpoint(
    path: Path,
    source_dir: Path,
    structure: ModelStructure,
    allocation: Allocation,
    layer_files: Sequence[Path],
    *,
    quantizer: Quantizer,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Join quantized layers (files of `save_layer`) with the unquantized tensors of the source model.

    Modules without a configuration stay as they are in the source. Peak memory is one shard of at most
    `max_shard_bytes`, or one tensor where that is larger. Before the checkpoint gets its name it is opened, as its
    users open it, and its logits are compared with those of the blocks that evaluation measures (see
    `lmq.checkpoint.reopen`).

    Raises:
        LmqError: it does not open, or computes something else.
        InputError: `path` exists, the source is quantized already or lacks a weight, or a layer file lacks a tensor
            or has one of another shape.
        DamagedFile: a file of the source or of the layers is missing or truncated.
    """
    source = read_stored_model(source_dir)
    quantized = _layer_tensors(layer_files)
    _check_quantized(quantized, _expected_tensors(structure, allocation))
    kept = _unquantized(source, structure, allocation, source_dir)
    config = _quantized_config(source_dir, structure, allocation, quantizer)
    with complete_directory(path) as directory:
        records = write_shards(directory, kept | quantized, max_shard_bytes, record=tensor_record)
        copy_companions(source_dir, directory)
        write_json(directory / "config.json", config)
        write_checksums(directory, records)
        blocks = QuantizedBlocks(directory, structure)
        model = StreamedModel.open(source_dir, structure)
        blocks.put_around(model)
        check_opens(directory, sample_logits(model, prepare=blocks.put_in), structure)


def write_checkpoint(
    path: Path,
    source_dir: Path,
    structure: ModelStructure,
    allocation: Allocation,
    quantizer: Quantizer,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Quantize a model directory layer by layer and write its checkpoint; raises as `assemble_checkpoint` does."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.layers.") as layers_dir:
        layer_files = []
        for layer in range(structure.layers):
            chosen = [info.id for info in structure.in_layer(layer) if info.id in allocation]
            by_kind = load_layer_weights(source_dir, structure, layer)
            weights = {module: by_kind[module.kind] for module in chosen}
            grids = {
                module: fit_grids(weight, [allocation[module]], quantizer, str(module))
                for module, weight in weights.items()
            }
            layer_files.append(Path(layers_dir) / f"layer-{layer:05d}.safetensors")
            save_layer(layer_files[-1], quantize_layer(structure, weights, grids, allocation))
        fitted = {
            info.id: fit_rows(stored_matrix(source_dir, structure, info), [allocation[info.id]], quantizer, None)
            for info in structure.embeddings
            if info.id in allocation
        }
        if fitted:
            layer_files.append(Path(layers_dir) / "embeddings.safetensors")
            save_layer(layer_files[-1], quantize_embeddings(source_dir, structure, fitted, allocation))
        assemble_checkpoint(
            path, source_dir, structure, allocation, layer_files, quantizer=quantizer, max_shard_bytes=max_shard_bytes
        )


def _layer_tensors(layer_files: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in layer_files:
        try:
            tensors |= headers_of([path])
        except InputError as error:
            raise DamagedFile(f"{path} is not a readable quantized layer: {error}; quantize the layer again") from error
    return tensors


def _expected_tensors(structure: ModelStructure, allocation: Allocation) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every quantized tensor, by name."""
    infos = {info.id: info for info in structure.quantized}
    unknown = [str(module) for module in allocation if module not in infos]
    if unknown:
        raise InputError(f"the allocation names {unknown[0]}, which the model does not have")
    return {
        f"{structure.path(module)}.{name}": (DTYPE_NAMES[dtype], shape)
        for module, spec in allocation.items()
        for name, (shape, dtype) in quantized_tensor_shapes(
            spec, infos[module].out_features, infos[module].in_features
        ).items()
    }


def _check_quantized(found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise InputError(f"{found[surplus[0]].file} holds {surplus[0]}, a module without a chosen configuration")
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise InputError(f"the layer files lack the tensor {name}; quantize its layer again")
        tensor = found[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise InputError(
                f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)} where the allocation needs "
                f"{dtype} {list(shape)}; quantize the layer again with this allocation"
            )


def _unquantized(
    source: StoredModel, structure: ModelStructure, allocation: Allocation, source_dir: Path
) -> dict[str, StoredTensor]:
    """The stored tensors that no quantized matrix replaces, surplus ones among them."""
    names = [f"{structure.path(module)}.weight" for module in allocation]
    for name in names:
        if not source.holds(name):
            raise InputError(f"{source_dir} has no tensor {name}; the structure describes another model")
    replaced = source.stored_names(names)
    return {name: tensor for name, tensor in source.headers.items() if name not in replaced}


def _quantized_config(
    source_dir: Path, structure: ModelStructure, allocation: Allocation, quantizer: Quantizer
) -> dict[str, Any]:
    config = read_config(source_dir)
    if config.get("quantization_config") is not None:
        raise InputError(f"{source_dir} is quantized already; give the unquantized model")
    shapes = {info.id: [info.out_features, info.in_features] for info in structure.quantized}
    modules = {
        structure.path(module): {"shape": shapes[module], **asdict(spec)} for module, spec in sorted(allocation.items())
    }
    lmq_config = LmqConfig(modules=modules, axis=quantizer.axis, quantizer=quantizer.describe())
    return {**config, "quantization_config": lmq_config.to_dict()}
