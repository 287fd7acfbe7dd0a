"""Checkpoints of compressed-tensors, format `pack-quantized`: what vLLM and SGLang serve with integer kernels.

A matrix `[out_features, in_features]` of b bits in groups of g becomes

- `weight_packed` int32 [out_features, in_features · b / 32]: codes along the row, the first in the lowest bits;
- `weight_scale` [out_features, in_features / g], in the 16-bit type of the checkpoint (float16 for float32 ones);
- `weight_zero_point` int32 [out_features · b / 32, in_features / g], 4 bits only: zeros packed down the column;
- `weight_shape` int64 [2].

Marlin, the kernel behind both engines, takes 4-bit codes with whole zeros in 0..15, and 8-bit codes without zeros of
their own: their zero is 128. A grid with other zeros is written as the nearest that the kernel holds
(`lmq.quantizers.integer_zeros`): a zero outside of the codes becomes the nearest code, on a grid that covers the group
and 0, and every code is rounded again to the dequantized weight. The report has the relative error of each matrix.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmq.allocation.constraints import ALIKE_PRESETS
from lmq.allocation.targets import TARGETS, list_modules
from lmq.checkpoint.write import DEFAULT_MAX_SHARD_BYTES
from lmq.errors import InputError
from lmq.export.report import ExportReport, ModuleStep, directory_bytes, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.groups import Grid, nearest_codes
from lmq.model.directory import complete_directory, copy_companions, write_json, write_shards
from lmq.model.tensors import headers_of
from lmq.quantizers.integer_zeros import SYMMETRIC_BITS, nearest_zero, refit_scale, whole_zeros

TARGET = TARGETS["vllm"]
FORMAT = "pack-quantized"
ADVICE = f"run again with target: {TARGET.name} (lmq run --target {TARGET.name}), which plans within what it holds"

_MARLIN_TILE = (64, 128)
"""What out_features and in_features are multiples of in every version of the kernel."""


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What vLLM cannot hold, one sentence for each reason with the modules it concerns; empty where it holds all."""
    if checkpoint.config.axis != 1:
        return [f"groups run along out_features (axis {checkpoint.config.axis}), where {TARGET.name} takes axis 1"]
    found: dict[str, list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        if reason := TARGET.misfit(spec, *checkpoint.shapes[path]):
            found[reason].append(path)
    if checkpoint.embeddings:
        found[f"{TARGET.name} is given no quantized embeddings and heads"] += checkpoint.embeddings
    if checkpoint.experts:
        found[f"mixtures of experts are not written for {TARGET.name}"] += checkpoint.experts
    for members in _fused(checkpoint):
        if len({_scheme(checkpoint, path) for path in members}) > 1:
            names = ", ".join(path.rpartition(".")[2] for path in members)
            found[f"{names} differ, which {TARGET.name} holds in one matrix"].append(members[0].rpartition(".")[0])
    return [f"{reason}: {list_modules(paths)}" for reason, paths in found.items()]


def export(checkpoint: QuantizedCheckpoint, target: Path) -> ExportReport:
    """Write the checkpoint to the directory `target`, with one matrix or one shard in memory at a time.

    Raises InputError for `problems`, and where `target` exists.
    """
    if found := problems(checkpoint):
        raise InputError(f"{checkpoint.path} cannot be written for {TARGET.name}: {'; '.join(found)}; {ADVICE}")
    steps: dict[str, ModuleStep] = {}
    with complete_directory(target) as directory:
        with tempfile.TemporaryDirectory(dir=directory) as parts:
            for path in checkpoint.specs:
                tensors, steps[path] = _module(checkpoint, path)
                save_file(tensors, Path(parts) / f"{path}.safetensors")
            write_shards(
                directory,
                {**checkpoint.unquantized, **headers_of(sorted(Path(parts).iterdir()))},
                DEFAULT_MAX_SHARD_BYTES,
            )
        copy_companions(checkpoint.path, directory)
        config = {**checkpoint.model_config, "quantization_config": quantization_config(checkpoint)}
        write_json(directory / "config.json", config)
    return ExportReport(path=target, size_bytes=directory_bytes(target), steps=steps, notes=_notes(checkpoint))


def quantization_config(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says of the matrices: a group per configuration with its modules by name, the rest ignored."""
    members: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        members[spec.bits, spec.group_size].append(path)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"b{bits}g{group_size}": {
                "targets": paths,
                "weights": _weights_config(bits, group_size),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for (bits, group_size), paths in sorted(members.items())
        },
        "ignore": sorted({"lm_head", *_dense_matrices(checkpoint)}),
    }


def _weights_config(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "type": "int",
        "num_bits": bits,
        "symmetric": bits == SYMMETRIC_BITS,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }


def _scheme(checkpoint: QuantizedCheckpoint, path: str) -> tuple[int, int] | None:
    """Bits and group size of a module, None where it is not quantized."""
    spec = checkpoint.specs.get(path)
    return None if spec is None else (spec.bits, spec.group_size)


def _module(checkpoint: QuantizedCheckpoint, path: str) -> tuple[dict[str, Tensor], ModuleStep]:
    """The tensors of one matrix by their full names, and what the step did to it."""
    spec, shape = checkpoint.specs[path], checkpoint.shapes[path]
    weight = checkpoint.weight(path)
    groups = weight.view(-1, spec.group_size)
    scale, zero = _held_grid(groups, checkpoint.grid(path), spec.bits)
    stored_scale = scale.to(_scale_dtype(checkpoint))
    scale = stored_scale.float()
    codes = nearest_codes(groups, scale, zero, spec.bits)
    per_row = (shape[0], shape[1] // spec.group_size)
    tensors = {
        "weight_packed": pack_rows(codes.view(shape).to(torch.uint8), spec.bits),
        "weight_scale": stored_scale.view(per_row),
        "weight_shape": torch.tensor(shape),
    }
    if spec.bits != SYMMETRIC_BITS:
        columns = zero.view(per_row).t().to(torch.uint8)
        tensors["weight_zero_point"] = pack_rows(columns, spec.bits).t().contiguous()
    written = codes.sub_(zero[:, None]).mul_(scale[:, None]).view(shape)
    step = ModuleStep(target=f"W{spec.bits}A16 g{spec.group_size}", relative_error=relative_error(written, weight))
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, step


def _held_grid(groups: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group as the kernel holds them; a grid that it holds stays as it is."""
    scale, zero = grid.decode()
    is_held = zero == nearest_zero(zero, bits)
    moved_scale, moved_zero = whole_zeros(groups, scale, zero, bits)
    moved_scale = refit_scale(groups, moved_scale, moved_zero, bits)
    return torch.where(is_held, scale, moved_scale), torch.where(is_held, zero, moved_zero)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] of 4 or 8 `bits` as int32 [rows, columns · bits / 32], the first in the lowest bits."""
    octets = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    return octets.reshape(-1).view(torch.int32).view(len(codes), -1)


def _scale_dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """The 16-bit type that an engine computes in: that of the checkpoint, float16 for a float32 one."""
    return torch.bfloat16 if checkpoint.dtype == torch.bfloat16 else torch.float16


def _dense_matrices(checkpoint: QuantizedCheckpoint) -> set[str]:
    """Paths of the modules whose weight is a matrix that was not quantized."""
    tensors = checkpoint.unquantized.items()
    return {name.removesuffix(".weight") for name, tensor in tensors if len(tensor.shape) == 2}


def _fused(checkpoint: QuantizedCheckpoint) -> list[list[str]]:
    """Modules that engines hold in one matrix, quantized or not, by path."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(_dense_matrices(checkpoint) | set(checkpoint.specs)):
        parent, _, name = path.rpartition(".")
        for preset in TARGET.alike:
            if name in ALIKE_PRESETS[preset]:
                groups[parent, preset].append(path)
    return list(groups.values())


def _notes(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    notes = []
    moved = [path for path in checkpoint.specs if _has_moved_zeros(checkpoint, path)]
    if moved:
        notes.append(f"zeros were moved to whole numbers in {list_modules(moved)}; to keep them exact, {ADVICE}")
    rows, columns = _MARLIN_TILE
    off_tile = [path for path, shape in checkpoint.shapes.items() if shape[0] % rows or shape[1] % columns]
    if off_tile:
        notes.append(
            f"{list_modules(off_tile)} are not multiples of {rows} by {columns}: vLLM pads such matrices for Marlin "
            "since its pull request 45295 (June 2026), and may find no kernel for them before"
        )
    return tuple(notes)


def _has_moved_zeros(checkpoint: QuantizedCheckpoint, path: str) -> bool:
    _, zero = checkpoint.grid(path).decode()
    return not torch.equal(zero, nearest_zero(zero, checkpoint.specs[path].bits))
