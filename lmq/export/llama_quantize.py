"""The plan of a checkpoint as llama-quantize of llama.cpp takes it: a type for each matrix.

llama-quantize fits its own grids to the full-precision model, so the file that it makes is not this checkpoint: only
the plan, which matrix gets how many bits, is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig

from lmq.export.gguf_model import gguf_name
from lmq.export.gguf_tensors import K_TYPES
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.packed_layer import TiedHead


def write_tensor_types(checkpoint: QuantizedCheckpoint, config: PreTrainedConfig, path: Path) -> str:
    """Write the file for `--tensor-type-file` and return how to use it, for a checkpoint that GGUF can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(tensor_types(checkpoint, config))
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    kept = {2: "f16", 4: "f32"}[checkpoint.dtype.itemsize]
    planned = dict(line.rsplit("=", 1) for line in lines)
    table = planned.get(f"^{re.escape('token_embd.weight')}$", kept)
    head = planned.get(f"^{re.escape('output.weight')}$", table if _is_tied(checkpoint) else kept)
    return (
        f"{path}: the plan for llama.cpp's own quantizer, from the full-precision model as GGUF: "
        f"llama-quantize --tensor-type-file {path} --token-embedding-type {table} --output-tensor-type {head} "
        "FULL.gguf OUT.gguf Q4_K_M"
    )


def _is_tied(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether a quantized embedding is the head as well."""
    return isinstance(checkpoint.model_tensors.model.get_output_embeddings(), TiedHead)


def tensor_types(checkpoint: QuantizedCheckpoint, config: PreTrainedConfig) -> Iterator[str]:
    """One `pattern=type` per matrix. llama-quantize searches the regular expression in the names of the tensors.

    The type is the matrix's own, or the one with its bits: q2_k, q3_k, q4_k; q4_0 where rows are not made of 256
    weights; q8_0.
    """
    for module, spec in checkpoint.specs.items():
        kind = GGMLQuantizationType.Q8_0 if spec.bits == 8 else GGMLQuantizationType.Q4_0
        if spec.gguf is not None:
            kind = GGMLQuantizationType(spec.gguf.of_rows(checkpoint.shapes[module][1]).number)
        elif spec.bits < 8 and checkpoint.shapes[module][1] % gguf.QK_K == 0:
            kind = K_TYPES[spec.bits]
        name = str(gguf_name(config, f"{module}.weight"))
        yield f"^{re.escape(name)}$={kind.name.lower()}"
