"""What the formats of integer kernels share: matrices with whole zeros, what they refuse, and the directory.

A grid with other zeros is written as the nearest that the kernels hold (`lmq.quantizers.integer_zeros`): a zero outside
of the codes becomes the nearest code, on a grid that covers the group and 0, and every code is rounded again to the
dequantized weight. The report has the relative error of each matrix.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmq.allocation.constraints import ALIKE_PRESETS
from lmq.allocation.targets import Target, list_modules
from lmq.checkpoint.write import DEFAULT_MAX_SHARD_BYTES
from lmq.errors import InputError
from lmq.export.report import ExportReport, ModuleStep, directory_bytes, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.groups import Grid, nearest_codes
from lmq.formats.integer_words import IntegerMatrix
from lmq.model.directory import complete_directory, copy_companions, write_json, write_shards
from lmq.model.tensors import headers_of
from lmq.quantizers.integer_zeros import nearest_zero, refit_scale, whole_zeros


def misfits(checkpoint: QuantizedCheckpoint, target: Target) -> dict[str, list[str]]:
    """Why the target does not hold the checkpoint: reasons, each with the paths of its modules unless it is of all."""
    if checkpoint.config.axis != 1:
        return {f"groups run along out_features (axis {checkpoint.config.axis}), where {target.name} takes axis 1": []}
    found: dict[str, list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        if reason := target.misfit(spec, *checkpoint.shapes[path]):
            found[reason].append(path)
    if checkpoint.embeddings:
        found[f"{target.name} is given no quantized embeddings and heads"] += checkpoint.embeddings
    if checkpoint.experts:
        found[f"mixtures of experts are not written for {target.name}"] += checkpoint.experts
    return found


def sentences(misfits: Mapping[str, list[str]]) -> list[str]:
    """One sentence for each reason, with the modules."""
    return [f"{reason}: {list_modules(paths)}" if paths else reason for reason, paths in misfits.items()]


def fused_modules(checkpoint: QuantizedCheckpoint, target: Target) -> list[list[str]]:
    """Paths of the matrices, quantized or not, that the target's engine holds in one: a list for each."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted(dense_matrices(checkpoint) | set(checkpoint.specs)):
        parent, _, name = path.rpartition(".")
        for preset in target.alike:
            if name in ALIKE_PRESETS[preset]:
                groups[parent, preset].append(path)
    return list(groups.values())


def fused_apart(checkpoint: QuantizedCheckpoint, target: Target) -> dict[str, list[str]]:
    """Kinds that the target's engine holds in one matrix and that differ, quantized or not, with their parents."""
    found: dict[str, list[str]] = defaultdict(list)
    for members in fused_modules(checkpoint, target):
        if len({checkpoint.specs.get(path) for path in members}) > 1:
            names = ", ".join(path.rpartition(".")[2] for path in members)
            found[names].append(members[0].rpartition(".")[0])
    return found


def dense_matrices(checkpoint: QuantizedCheckpoint) -> set[str]:
    """Paths of the modules whose weight is a matrix that was not quantized."""
    tensors = checkpoint.unquantized.items()
    return {name.removesuffix(".weight") for name, tensor in tensors if len(tensor.shape) == 2}


def is_symmetric(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether the zero of every group is the middle of the codes."""
    return all(
        bool((checkpoint.grid(path).decode()[1] == 2 ** (spec.bits - 1)).all())
        for path, spec in checkpoint.specs.items()
    )


def integer_tensors(
    checkpoint: QuantizedCheckpoint,
    path: str,
    *,
    layout: Callable[[IntegerMatrix], dict[str, Tensor]],
    scale_dtype: torch.dtype,
) -> tuple[dict[str, Tensor], ModuleStep]:
    """The tensors of a matrix with whole zeros and scales in `scale_dtype`, and what that did to it."""
    spec, shape = checkpoint.specs[path], checkpoint.shapes[path]
    weight = checkpoint.weight(path)
    groups = weight.view(-1, spec.group_size)
    scale, zero = _held_grid(groups, checkpoint.grid(path), spec.bits)
    scale = scale.to(scale_dtype)
    codes = nearest_codes(groups, scale.float(), zero, spec.bits)
    per_row = (shape[0], shape[1] // spec.group_size)
    matrix = IntegerMatrix(
        bits=spec.bits,
        codes=codes.view(shape).to(torch.uint8),
        scale=scale.view(per_row),
        zero=zero.view(per_row).to(torch.uint8),
    )
    error = relative_error(matrix.dequantize(), weight)
    return layout(matrix), ModuleStep(target=f"W{spec.bits}A16 g{spec.group_size}", relative_error=error)


def _held_grid(groups: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group as the kernels hold them; a grid that they hold stays as it is."""
    scale, zero = grid.decode()
    is_held = zero == nearest_zero(zero, bits)
    moved_scale, moved_zero = whole_zeros(groups, scale, zero, bits)
    moved_scale = refit_scale(groups, moved_scale, moved_zero, bits)
    return torch.where(is_held, scale, moved_scale), torch.where(is_held, zero, moved_zero)


def moved_zeros_note(checkpoint: QuantizedCheckpoint, advice: str) -> list[str]:
    """What is to be said where zeros were moved."""
    grids = [path for path, spec in checkpoint.specs.items() if spec.gguf is None]
    moved = [path for path in grids if _has_moved_zeros(checkpoint, path)]
    return (
        [f"zeros were moved to whole numbers in {list_modules(moved)}; to keep them exact, {advice}"] if moved else []
    )


def _has_moved_zeros(checkpoint: QuantizedCheckpoint, path: str) -> bool:
    _, zero = checkpoint.grid(path).decode()
    return not torch.equal(zero, nearest_zero(zero, checkpoint.specs[path].bits))


def planning_advice(target: Target) -> str:
    """What to do about a checkpoint that was not planned for the target."""
    return f"run again with target: {target.name} (lmq run --target {target.name}), which plans within what it holds"


def write_directory(
    checkpoint: QuantizedCheckpoint,
    path: Path,
    *,
    problems: list[str],
    target: Target,
    tensors_of: Callable[[str], tuple[dict[str, Tensor], ModuleStep]],
    quantization_config: dict[str, Any],
    also: Mapping[str, dict[str, Any]] | None = None,
    notes: tuple[str, ...] = (),
) -> ExportReport:
    """Write the directory `path` with one matrix or one shard in memory at a time.

    `tensors_of` gives the tensors of the matrix of a path, by the names that they have in its module, and its step;
    `also` are further JSON files.
    Raises InputError for `problems`, and where `path` exists.
    """
    if problems:
        raise InputError(
            f"{checkpoint.path} cannot be written for {target.name}: {'; '.join(problems)}; {planning_advice(target)}"
        )
    steps: dict[str, ModuleStep] = {}
    with complete_directory(path) as directory:
        with tempfile.TemporaryDirectory(dir=directory) as parts:
            for module in checkpoint.specs:
                tensors, steps[module] = tensors_of(module)
                named = {f"{module}.{name}": tensor for name, tensor in tensors.items()}
                save_file(named, Path(parts) / f"{module}.safetensors")
            stored = {**checkpoint.unquantized, **headers_of(sorted(Path(parts).iterdir()))}
            write_shards(directory, stored, DEFAULT_MAX_SHARD_BYTES)
        copy_companions(checkpoint.path, directory)
        write_json(directory / "config.json", {**checkpoint.model_config, "quantization_config": quantization_config})
        for name, content in (also or {}).items():
            write_json(directory / name, content)
    return ExportReport(path=path, size_bytes=directory_bytes(path), steps=steps, notes=notes)
