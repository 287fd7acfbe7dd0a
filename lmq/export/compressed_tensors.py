"""Checkpoints of compressed-tensors, which vLLM and SGLang serve: weights of 4 and 8 bits, integers or floats.

Format `pack-quantized`: a matrix `[out_features, in_features]` of b bits in groups of g becomes

- `weight_packed` int32 [out_features, in_features · b / 32]: codes along the row, the first in the lowest bits;
- `weight_scale` [out_features, in_features / g], in the 16-bit type of the checkpoint (float16 for float32 ones);
- `weight_zero_point` int32 [out_features · b / 32, in_features / g], 4 bits only: zeros packed down the column;
- `weight_shape` int64 [2].

Marlin, the kernel behind both engines, takes 4-bit codes with whole zeros in 0..15, and 8-bit codes without zeros of
their own: their zero is 128.

Formats `mxfp4-pack-quantized` and `nvfp4-pack-quantized` are those of `lmq.formats.float4`, `naive-quantized` is that
of `lmq.formats.float8`. Their codes and scales are the checkpoint's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.allocation.targets import TARGETS, list_modules
from lmq.export.integer_codes import (
    dense_matrices,
    fused_apart,
    fused_modules,
    integer_tensors,
    misfits,
    moved_zeros_note,
    planning_advice,
    sentences,
    write_directory,
)
from lmq.export.report import ExportReport, ModuleStep, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.float4 import float4_tensors, largest_scale
from lmq.formats.float8 import float8_tensors
from lmq.formats.integer_words import IntegerMatrix, pack_words
from lmq.formats.spec import QuantSpec
from lmq.quantizers.integer_zeros import SYMMETRIC_BITS

TARGET = TARGETS["vllm"]
MIXED = "mixed-precision"

_FLOAT_FORMATS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized", "fp8": "naive-quantized"}
_FLOAT_SCALES: Mapping[str, Mapping[str, Any]] = {
    "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    "fp8": {"strategy": "channel", "group_size": None},
}
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
        tensors_of=partial(_tensors_of, checkpoint, _joined(checkpoint)),
        quantization_config=quantization_config(checkpoint),
        notes=() if found else _notes(checkpoint),
    )


def quantization_config(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says of the matrices: a group per configuration with its modules by name, the rest ignored."""
    members: dict[QuantSpec, list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        members[spec].append(path)
    formats = {_format(spec) for spec in members}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            spec.name: {
                "targets": paths,
                "weights": _weights_config(spec),
                "input_activations": None,
                "output_activations": None,
                "format": _format(spec),
            }
            for spec, paths in sorted(members.items())
        },
        "ignore": sorted({"lm_head", *dense_matrices(checkpoint)}),
    }


def _format(spec: QuantSpec) -> str:
    return "pack-quantized" if spec.gguf is None else _FLOAT_FORMATS[spec.name]


def _weights_config(spec: QuantSpec) -> dict[str, Any]:
    if spec.gguf is not None:
        of_type = {"type": "float", "symmetric": True, **_FLOAT_SCALES[spec.name]}
    else:
        symmetric = spec.bits == SYMMETRIC_BITS
        of_type = {"type": "int", "symmetric": symmetric, "strategy": "group", "group_size": spec.group_size}
    return {"num_bits": spec.bits, "dynamic": False, **of_type}


def _joined(checkpoint: QuantizedCheckpoint) -> dict[str, list[str]]:
    """The paths of the matrices that the engine holds in one with that of a path, itself among them."""
    return {path: members for members in fused_modules(checkpoint, TARGET) for path in members}


def _tensors_of(
    checkpoint: QuantizedCheckpoint, joined: Mapping[str, list[str]], path: str
) -> tuple[dict[str, Tensor], ModuleStep]:
    """The tensors of a matrix, and what writing them did to it."""
    if checkpoint.specs[path].gguf is None:
        return integer_tensors(checkpoint, path, layout=_integers, scale_dtype=_scale_dtype(checkpoint))
    matrix = checkpoint.blocks(path)
    target = f"{matrix.kind.name.upper()}A16"
    if matrix.kind.name == "fp8":
        return float8_tensors(matrix), ModuleStep(target=target, relative_error=0.0)
    largest = max(largest_scale(checkpoint.blocks(member)) for member in joined.get(path, [path]))
    tensors, written = float4_tensors(matrix, largest)
    error = relative_error(written, matrix.dequantize())
    return tensors, ModuleStep(target=target, relative_error=error)


def _integers(matrix: IntegerMatrix) -> dict[str, Tensor]:
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
    if checkpoint.dtype != torch.bfloat16 and any(spec.name == "mxfp4" for spec in checkpoint.specs.values()):
        notes.append("Marlin computes mxfp4 in bfloat16 alone: serve this with --dtype bfloat16")
    return tuple(notes)
