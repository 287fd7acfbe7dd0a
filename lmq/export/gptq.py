"""Checkpoints of GPTQ: what GPTQModel, SGLang and transformers (through GPTQModel) open, and vLLM in part.

Tensors are those of GPTQ's layout in `lmq.formats.integer_words`, scales float16, columns in their order (no
`desc_act`). Where the zero of every group is the middle of the codes, the checkpoint is symmetric and stores zeros less
1, as `gptq` (v1) has them. Other zeros are stored as they are, as `gptq_v2`: GPTQModel refuses them in v1 from other
programs, and a zero of 0 has no place there.

The configuration that most weights have is that of the checkpoint; modules of others are named in `dynamic` by patterns
that start with `+:`, and matrices in the blocks that are not quantized by such that start with `-:`. vLLM looks up the
matrices that it fuses by names of its own, so the patterns have these too. transformers does not read `dynamic`.

vLLM took all of this until its pull request 38288 (June 2026), and since then symmetric codes of 4 and 8 bits alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lmq
from lmq.allocation.constraints import ALIKE_PRESETS
from lmq.allocation.targets import TARGETS
from lmq.export.integer_codes import (
    dense_matrices,
    fused_apart,
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
from lmq.formats.spec import QuantSpec

TARGET = TARGETS["gptq"]
CONFIG_FILE = "quantize_config.json"

FUSED_NAMES = {"qkv": "qkv_proj", "gate-up": "gate_up_proj"}
"""What vLLM calls the matrix that it holds kinds of `ALIKE_PRESETS` in."""

VLLM_BITS = (4, 8)
"""Of the symmetric codes that vLLM takes."""

_IN_BLOCK = re.compile(r"(.+?\.)(\d+)(\..+)")


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What the kernels cannot hold, one sentence for each reason with the modules; empty where they hold all."""
    return sentences(misfits(checkpoint, TARGET))


def export(checkpoint: QuantizedCheckpoint, target: Path) -> ExportReport:
    """Write the checkpoint to the directory `target`, with one matrix or one shard in memory at a time.

    Raises InputError for `problems`, and where `target` exists.
    """
    found = problems(checkpoint)
    symmetric = not found and is_symmetric(checkpoint)
    config = quantization_config(checkpoint, symmetric=symmetric)
    return write_directory(
        checkpoint,
        target,
        problems=found,
        target=TARGET,
        tensors_of=partial(
            integer_tensors,
            checkpoint,
            layout=partial(gptq_tensors, zero_offset=int(symmetric)),
            scale_dtype=torch.float16,
        ),
        quantization_config=config,
        also={CONFIG_FILE: config},
        notes=() if found else _notes(checkpoint, config),
    )


def quantization_config(checkpoint: QuantizedCheckpoint, *, symmetric: bool) -> dict[str, Any]:
    """What config.json and `quantize_config.json` say of the matrices, as GPTQModel writes it."""
    base = base_spec(checkpoint)
    layout = "gptq" if symmetric else "gptq_v2"
    config = {
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lmq:{lmq.__version__}"]},
    }
    dynamic = _rules(checkpoint, base)
    return config | ({"dynamic": dynamic} if dynamic else {})


def base_spec(checkpoint: QuantizedCheckpoint) -> QuantSpec:
    """The configuration that most weights have."""
    weights: Counter[QuantSpec] = Counter()
    for path, spec in sorted(checkpoint.specs.items()):
        rows, columns = checkpoint.shapes[path]
        weights[spec] += rows * columns
    return weights.most_common(1)[0][0]


def unquantized_in_blocks(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Paths of the matrices beside quantized ones that are not quantized themselves."""
    parents = {path.rpartition(".")[0] for path in checkpoint.specs}
    return sorted(path for path in dense_matrices(checkpoint) if path.rpartition(".")[0] in parents)


def _rules(checkpoint: QuantizedCheckpoint, base: QuantSpec) -> dict[str, dict[str, int]]:
    """The entries of `dynamic`: no module matches two of them."""
    members: dict[QuantSpec, list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        if spec != base:
            members[spec].append(path)
    rules: dict[str, dict[str, int]] = {}
    for spec, paths in sorted(members.items()):
        for pattern in _patterns([*paths, *_fused(paths)]):
            rules[f"+:{pattern}"] = {"bits": spec.bits, "group_size": spec.group_size}
    unquantized = unquantized_in_blocks(checkpoint)
    return rules | {f"-:{pattern}": {} for pattern in _patterns([*unquantized, *_fused(unquantized)])}


def _fused(paths: Iterable[str]) -> list[str]:
    """Paths of the fused matrices of which all kinds are among the paths."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        parent, _, name = path.rpartition(".")
        names[parent].add(name)
    return [
        f"{parent}.{fused}"
        for parent, present in names.items()
        for preset, fused in FUSED_NAMES.items()
        if present.issuperset(ALIKE_PRESETS[preset])
    ]


def _patterns(paths: Iterable[str]) -> list[str]:
    """Regular expressions that match these paths alone: `^model\\.layers\\.(?:0|7)\\.mlp\\.(?:down_proj|up_proj)$`."""
    layers_of: dict[tuple[str, str], set[int]] = defaultdict(set)
    patterns = []
    for path in paths:
        if match := _IN_BLOCK.fullmatch(path):
            layers_of[match[1], match[3]].add(int(match[2]))
        else:
            patterns.append(f"^{re.escape(path)}$")
    names_of: dict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (before, after), layers in layers_of.items():
        parent, _, name = after.rpartition(".")
        names_of[before, parent, tuple(sorted(layers))].append(name)
    for (before, parent, numbers_of_layers), names in names_of.items():
        numbers = "|".join(map(str, numbers_of_layers))
        last = "|".join(map(re.escape, sorted(names)))
        patterns.append(f"^{re.escape(before)}(?:{numbers}){re.escape(parent)}\\.(?:{last})$")
    return sorted(patterns)


def _notes(checkpoint: QuantizedCheckpoint, config: dict[str, Any]) -> tuple[str, ...]:
    notes = moved_zeros_note(checkpoint, planning_advice(TARGET))
    if "dynamic" in config:
        notes.append(
            "modules differ in bits or groups, which GPTQModel and SGLang read and transformers does not; for "
            "transformers export with --format auto-round"
        )
    if not config["sym"] or any(spec.bits not in VLLM_BITS for spec in checkpoint.specs.values()):
        notes.append(
            "vLLM does not open this since its pull request 38288 (June 2026): it takes GPTQ of 4 and 8 bits with the "
            "zero of every group in the middle; for it run again with target: vllm or gptq-symmetric"
        )
    notes += [
        f"{names} differ in {len(parents)} blocks, so vLLM and SGLang, which hold them in one matrix, cannot open it; "
        f"{planning_advice(TARGET)}"
        for names, parents in fused_apart(checkpoint, TARGET).items()
    ]
    return tuple(notes)
