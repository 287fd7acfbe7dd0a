"""Checkpoints of AutoRound: what transformers opens with the auto-round package, bits and groups by module.

Tensors are those of GPTQ's layout (`lmq.formats.integer_words`) without `g_idx`, as AutoRound writes them. Where the
zero of every group is the middle of the codes, `packing_format` is `auto_round:auto_gptq`, whose zeros are stored less
1; else `auto_round`, which stores them as they are: AutoRound opens other zeros in no other layout of the two. Modules
with another configuration than most weights are in `extra_config` by their paths; matrices in the blocks that are not
quantized have 16 bits there.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lmq.allocation.targets import TARGETS
from lmq.export.gptq import base_spec, unquantized_in_blocks
from lmq.export.integer_codes import (
    integer_tensors,
    is_symmetric,
    misfits,
    moved_zeros_note,
    planning_advice,
    sentences,
    write_directory,
)
from lmq.export.report import ExportReport
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.integer_words import gptq_tensors

TARGET = TARGETS["auto-round"]

_IN_BLOCK = re.compile(r"(.+?)\.\d+\.")


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What the program cannot hold, one sentence for each reason with the modules; empty where it holds all."""
    return sentences(misfits(checkpoint, TARGET))


def export(checkpoint: QuantizedCheckpoint, target: Path) -> ExportReport:
    """Write the checkpoint to the directory `target`, with one matrix or one shard in memory at a time.

    Raises InputError for `problems`, and where `target` exists.
    """
    found = problems(checkpoint)
    symmetric = not found and is_symmetric(checkpoint)
    return write_directory(
        checkpoint,
        target,
        problems=found,
        target=TARGET,
        tensors_of=partial(
            integer_tensors,
            checkpoint,
            layout=partial(gptq_tensors, zero_offset=int(symmetric), column_groups=False),
            scale_dtype=torch.float16,
        ),
        quantization_config=quantization_config(checkpoint, symmetric=symmetric),
        notes=() if found else tuple(moved_zeros_note(checkpoint, planning_advice(TARGET))),
    )


def quantization_config(checkpoint: QuantizedCheckpoint, *, symmetric: bool) -> dict[str, Any]:
    """What config.json says of the matrices, as AutoRound writes it."""
    base = base_spec(checkpoint)
    extra: dict[str, dict[str, int]] = {
        path: {"bits": spec.bits, "group_size": spec.group_size}
        for path, spec in checkpoint.specs.items()
        if spec != base
    }
    extra |= {path: {"bits": 16} for path in unquantized_in_blocks(checkpoint)}
    config = {
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": symmetric,
        "data_type": "int",
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        "block_name_to_quantize": ",".join(_blocks(checkpoint)),
    }
    return config | ({"extra_config": extra} if extra else {})


def _blocks(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Paths of the lists of blocks that have quantized matrices: `model.layers`."""
    return sorted({match[1] for path in checkpoint.specs if (match := _IN_BLOCK.match(path))})
