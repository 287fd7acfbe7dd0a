"""Quantized checkpoints: a model directory that transformers opens after `import lmq`.

- `config.json`: that of the source plus `quantization_config` (see `lmq.hf_quantizer.LmqConfig`).
- generation, tokenizer, template and licence files of the source, as they are.
- `model.safetensors`, or `model-0000i-of-0000N.safetensors` with `model.safetensors.index.json`. A quantized module
  is `<module path>.codes` (see `lmq.packing`), `.scale_codes`, `.zero_codes`, `.scale_ranges` and `.matrix_range`
  (see `lmq.grid`), together exactly `QuantSpec.size_bytes`; every other tensor is copied bit for bit.

The same inputs give the same bytes. A checkpoint is written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmq.errors import DamagedFile, InputError
from lmq.frobenius import LayerGrids, fit_grids
from lmq.hf_quantizer import QUANT_METHOD, LmqConfig
from lmq.linear import QUANTIZED_TENSORS, quantize_weight, quantized_tensor_shapes
from lmq.quant_spec import QuantSpec
from lmq.quantizers import Quantizer
from lmq.structure import ModelStructure, ModuleId
from lmq.tensor_files import INDEX_FILE, WEIGHTS_FILE, StoredTensor, read_directory, read_header

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY.md")
_DTYPE_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}

Choice = Mapping[ModuleId, QuantSpec]


def quantize_layer(
    structure: ModelStructure, weights: Mapping[ModuleId, torch.Tensor], grids: LayerGrids, choice: Choice
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors of the modules in `weights`, each on its grid of the chosen configuration, on the CPU.

    `weights` [out_features, in_features] each. Raises InputError for a module without a choice or a grid.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in weights.items():
        grid = grids.get(module, {}).get(choice[module]) if module in choice else None
        if grid is None:
            raise InputError(
                f"no grid for {module} at {choice.get(module, 'no chosen configuration')}; "
                "fit the grids of the whole menu and give every module of the layer a configuration"
            )
        for name, tensor in quantize_weight(weight, grid).items():
            tensors[f"{structure.path(module)}.{name}"] = tensor.cpu()
    return tensors


def save_layer(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of `quantize_layer` as one safetensors file."""
    save_file(dict(tensors), path)


def assemble_checkpoint(
    path: Path,
    source_dir: Path,
    structure: ModelStructure,
    choice: Choice,
    layer_files: Sequence[Path],
    *,
    quantizer: Quantizer,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Join quantized layers (files of `save_layer`) with the unquantized tensors of the source model.

    Modules without a choice stay as they are in the source. Peak memory is one shard of at most `max_shard_bytes`,
    or one tensor where that is larger.

    Raises:
        InputError: `path` exists, the source is quantized already or lacks a weight, or a layer file lacks a tensor
            or has one of another shape.
        DamagedFile: a file of the source or of the layers is missing or truncated.
    """
    source = read_directory(source_dir)
    quantized = {name: tensor for file in layer_files for name, tensor in read_header(file).items()}
    _check_quantized(quantized, _expected_tensors(structure, choice), "the layer files")
    kept = _unquantized(source, structure, choice, source_dir)
    config = _quantized_config(source_dir, structure, choice, quantizer)
    with _complete_directory(path) as directory:
        _write_shards(directory, kept | quantized, max_shard_bytes)
        _copy_companions(source_dir, directory)
        _write_json(directory / "config.json", config)


def write_checkpoint(
    path: Path,
    source_dir: Path,
    structure: ModelStructure,
    choice: Choice,
    quantizer: Quantizer,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Quantize a model directory layer by layer and write its checkpoint; raises as `assemble_checkpoint` does."""
    source = read_directory(source_dir)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.layers.") as layers_dir:
        layer_files = []
        for layer in range(structure.layers):
            chosen = [info.id for info in structure.in_layer(layer) if info.id in choice]
            weights = {module: _source_weight(source, structure, module, source_dir).load() for module in chosen}
            grids = {
                module: fit_grids(weight, [choice[module]], quantizer, str(module))
                for module, weight in weights.items()
            }
            layer_files.append(Path(layers_dir) / f"layer-{layer:05d}.safetensors")
            save_layer(layer_files[-1], quantize_layer(structure, weights, grids, choice))
        assemble_checkpoint(
            path, source_dir, structure, choice, layer_files, quantizer=quantizer, max_shard_bytes=max_shard_bytes
        )


def verify_checkpoint(path: Path) -> None:
    """Check a checkpoint by its headers: configuration readable, no shard missing or truncated, every quantized
    tensor there with its size. Raises DamagedFile or InputError naming the file and the tensor.
    """
    config = read_quantization_config(path)
    tensors = read_directory(path)
    for module_path, spec in config.specs.items():
        found_bytes = _module_bytes(tensors, module_path, path)
        parameters = tensors[f"{module_path}.codes"].size_bytes * 8 // spec.bits
        expected_bytes = spec.size_bytes(parameters)
        if found_bytes != expected_bytes:
            raise DamagedFile(
                f"{path}: {module_path} takes {found_bytes:,} bytes where {spec} takes {expected_bytes:,}; "
                "write the checkpoint again"
            )


def quantized_bytes(path: Path) -> int:
    """Data bytes of the quantized tensors of a checkpoint, from the headers of its files."""
    tensors = read_directory(path)
    return sum(_module_bytes(tensors, module_path, path) for module_path in read_quantization_config(path).modules)


def read_quantization_config(path: Path) -> LmqConfig:
    """The `quantization_config` of a checkpoint. Raises InputError if it is not an lmq checkpoint."""
    fields = _read_config(path).get("quantization_config")
    if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{path} is not a checkpoint written by lmq: its config.json has no lmq quantization_config")
    try:
        return LmqConfig.from_dict(fields)
    except TypeError as error:
        raise DamagedFile(f"{path / 'config.json'} has a damaged quantization_config: {error}") from error


def _module_bytes(tensors: Mapping[str, StoredTensor], module_path: str, path: Path) -> int:
    names = [f"{module_path}.{name}" for name in QUANTIZED_TENSORS]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise DamagedFile(f"{path} lacks the tensor {missing[0]}; write the checkpoint again")
    return sum(tensors[name].size_bytes for name in names)


def _expected_tensors(structure: ModelStructure, choice: Choice) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every quantized tensor, by name."""
    infos = {info.id: info for info in structure.modules}
    unknown = [str(module) for module in choice if module not in infos]
    if unknown:
        raise InputError(f"the choice names {unknown[0]}, which the model does not have")
    return {
        f"{structure.path(module)}.{name}": (_DTYPE_NAMES[dtype], shape)
        for module, spec in choice.items()
        for name, (shape, dtype) in quantized_tensor_shapes(
            spec, infos[module].out_features, infos[module].in_features
        ).items()
    }


def _check_quantized(
    found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise InputError(f"{found[surplus[0]].file} holds {surplus[0]}, a module without a chosen configuration")
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise InputError(f"{where} lack the tensor {name}; quantize its layer again")
        tensor = found[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise InputError(
                f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)} where the choice needs "
                f"{dtype} {list(shape)}; quantize the layer again with this choice"
            )


def _source_weight(
    source: Mapping[str, StoredTensor], structure: ModelStructure, module: ModuleId, source_dir: Path
) -> StoredTensor:
    name = f"{structure.path(module)}.weight"
    if name not in source:
        raise InputError(f"{source_dir} has no tensor {name}; the structure describes another model")
    return source[name]


def _unquantized(
    source: Mapping[str, StoredTensor], structure: ModelStructure, choice: Choice, source_dir: Path
) -> dict[str, StoredTensor]:
    replaced = {_source_weight(source, structure, module, source_dir).name for module in choice}
    return {name: tensor for name, tensor in source.items() if name not in replaced}


def _quantized_config(
    source_dir: Path, structure: ModelStructure, choice: Choice, quantizer: Quantizer
) -> dict[str, Any]:
    config = _read_config(source_dir)
    if config.get("quantization_config") is not None:
        raise InputError(f"{source_dir} is quantized already; give the unquantized model")
    modules = {structure.path(module): asdict(choice[module]) for module in sorted(choice)}
    lmq_config = LmqConfig(modules=modules, axis=quantizer.axis, quantizer=quantizer.describe())
    return {**config, "quantization_config": lmq_config.to_dict()}


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{directory} has no config.json; is it a model directory?") from error
    except ValueError as error:
        raise DamagedFile(f"{directory / 'config.json'} is not JSON: {error}; write or download it again") from error


@contextmanager
def _complete_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` that gets its name when the block ends well, and is removed otherwise."""
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as parent:
        directory = Path(parent) / path.name
        directory.mkdir()
        yield directory
        directory.rename(path)


def _write_shards(directory: Path, tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> None:
    shards = _split(sorted(tensors.values(), key=lambda tensor: tensor.name), max_shard_bytes)
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total_bytes = sum(tensor.size_bytes for tensor in tensors.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        save_file({tensor.name: tensor.load() for tensor in shard}, directory / file, metadata={"format": "pt"})


def _split(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor.size_bytes
    return shards


def _copy_companions(source_dir: Path, directory: Path) -> None:
    """Copy what a model directory needs beside its weights; the index of the source's shards is not it."""
    for file in sorted(source_dir.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.stem in _COPIED_NAMES or file.name in _COPIED_NAMES
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
