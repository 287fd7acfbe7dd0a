"""Checkpoints of compressed-tensors, format `pack-quantized`: what vLLM and SGLang serve with integer kernels.

A matrix `[out_features, in_features]` of b bits in groups of g becomes

- `weight_packed` int32 [out_features, in_features · b / 32]: codes along the row, the first in the lowest bits;
- `weight_scale` [out_features, in_features / g], in the 16-bit type of the checkpoint (float16 for float32 ones);
- `weight_zero_point` int32 [out_features · b / 32, in_features / g], 4 bits only: zeros packed down the column;
- `weight_shape` int64 [2].

Marlin, the kernel behind both engines, takes 4-bit codes with whole zeros in 0..15, and 8-bit codes without zeros of
their own: their zero is 128.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.allocation.targets import TARGETS, list_modules
from lmq.export.integer_codes import (
    dense_matrices,
    fused_apart,
    misfits,
    moved_zeros_note,
    planning_advice,
    sentences,
    write_directory,
)
from lmq.export.report import ExportReport
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.integer_words import IntegerMatrix, pack_words
from lmq.quantizers.integer_zeros import SYMMETRIC_BITS

TARGET = TARGETS["vllm"]
FORMAT = "pack-quantized"

_MARLIN_TILE = (64, 128)
"""What out_features and in_features are multiples of in every version of the kernel."""


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What vLLM cannot hold, one sentence for each reason with the modules it concerns; empty where it holds all."""
    found = misfits(checkpoint, TARGET)
    for names, parents in fused_apart(checkpoint, TARGET).items():
        found[f"{names} differ, which {TARGET.name} holds in one matrix"] = parents
    return sentences(found)


def export(checkpoint: QuantizedCheckpoint, target: Path) -> ExportReport:
    """Write the checkpoint to the directory `target`, with one matrix or one shard in memory at a time.

    Raises InputError for `problems`, and where `target` exists.
    """
    found = problems(checkpoint)
    return write_directory(
        checkpoint,
        target,
        problems=found,
        target=TARGET,
        tensors_of=_tensors,
        scale_dtype=_scale_dtype(checkpoint),
        quantization_config=quantization_config(checkpoint),
        notes=() if found else _notes(checkpoint),
    )


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
        "ignore": sorted({"lm_head", *dense_matrices(checkpoint)}),
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


def _tensors(matrix: IntegerMatrix) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack_words(matrix.codes, matrix.bits),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if matrix.bits != SYMMETRIC_BITS:
        tensors["weight_zero_point"] = pack_words(matrix.zero.t(), matrix.bits).t().contiguous()
    return tensors


def _scale_dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """The 16-bit type that an engine computes in: that of the checkpoint, float16 for a float32 one."""
    return torch.bfloat16 if checkpoint.dtype == torch.bfloat16 else torch.float16


def _notes(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    notes = moved_zeros_note(checkpoint, planning_advice(TARGET))
    rows, columns = _MARLIN_TILE
    off_tile = [path for path, shape in checkpoint.shapes.items() if shape[0] % rows or shape[1] % columns]
    if off_tile:
        notes.append(
            f"{list_modules(off_tile)} are not multiples of {rows} by {columns}: vLLM pads such matrices for Marlin "
            "since its pull request 45295 (June 2026), and may find no kernel for them before"
        )
    return tuple(notes)
