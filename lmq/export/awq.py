"""Checkpoints of AWQ, version `gemm`: what vLLM, SGLang and transformers (through GPTQModel) open.

Tensors are those of AWQ's layout in `lmq.formats.integer_words`: 4 bits, whole zeros, float16 scales, one group size.
AWQ names the layout here, not how the codes were found. Matrices that are not quantized are in
`modules_to_not_convert`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lmq.allocation.targets import TARGETS
from lmq.export.gptq import base_spec, unquantized_in_blocks
from lmq.export.integer_codes import (
    integer_tensors,
    misfits,
    moved_zeros_note,
    planning_advice,
    sentences,
    write_directory,
)
from lmq.export.report import ExportReport
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.integer_words import awq_tensors

TARGET = TARGETS["awq"]


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What the kernels cannot hold, one sentence for each reason with the modules; empty where they hold all."""
    found = misfits(checkpoint, TARGET)
    base = base_spec(checkpoint)
    if not found and (others := [path for path, spec in checkpoint.specs.items() if spec != base]):
        found[f"AWQ holds one group size, and most weights are {base}"] = others
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
        tensors_of=partial(integer_tensors, checkpoint, layout=awq_tensors, scale_dtype=torch.float16),
        quantization_config=quantization_config(checkpoint),
        notes=() if found else tuple(moved_zeros_note(checkpoint, planning_advice(TARGET))),
    )


def quantization_config(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says of the matrices, as AutoAWQ writes it."""
    base = base_spec(checkpoint)
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": base.bits,
        "group_size": base.group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", *unquantized_in_blocks(checkpoint)],
    }
