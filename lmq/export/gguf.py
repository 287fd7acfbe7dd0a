"""GGUF files, which llama.cpp and the programs built on it open.

A matrix whose configuration is a type of GGUF, as `target: llama.cpp` plans them, is written byte for byte. What
another one becomes depends on its configuration and on `fidelity`:

- "size", the default: the type nearest in size, Q2_K, Q3_K or Q4_K, where rows are made of 256 weights; Q4_1 where
  they are not, and for b4g32, whose codes it holds. The codes of K types are fitted anew: Q4_K (4.5 bits) and Q2_K
  (2.625) follow the grids of lmq closely; Q3_K (3.4375) has no offset and loses nearly as much again as the
  quantization did.
- "exact": matrices of 2, 3 and 4 bits become Q4_1, which holds their very codes; only the scale and the offset are
  rounded to float16. That costs 5 bits per weight whatever the configuration, and the checkpoint's evaluation holds
  for the file. Groups that are not made of whole blocks of 32 neighbours (along the other axis, or of 16) are
  rounded to Q8_0 instead.

Matrices of 8 bits become Q8_0 either way. Every step's error is measured on the written bytes. To make a file as
small as the plan with llama.cpp's own quantizer, from the full-precision model, see `lmq.export.llama_quantize`.

What lmq left unquantized keeps its type, except that norms and biases are float32, as llama.cpp wants them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import AutoConfig, PreTrainedConfig

from lmq.errors import InputError, unknown_name
from lmq.export.gguf_model import ARCHITECTURES, add_metadata, config_notes, config_problems, unread_settings
from lmq.export.gguf_tensors import (
    Fidelity,
    GgufTensor,
    plan_tensors,
    tensor_problems,
    tensor_rows,
)
from lmq.export.gguf_tokenizer import GgufTokenizer
from lmq.export.llama_quantize import write_tensor_types
from lmq.export.report import ExportReport, ModuleStep
from lmq.export.source import QuantizedCheckpoint
from lmq.model.discovery import embedding_shape

_FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    GGMLQuantizationType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    GGMLQuantizationType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
}


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """What of the checkpoint a GGUF file cannot hold."""
    config = _model_config(checkpoint)
    found = list(config_problems(config))
    if config.model_type not in ARCHITECTURES:
        return found
    found += tensor_problems(checkpoint, config)
    try:
        found += GgufTokenizer(checkpoint.path, _vocabulary_size(checkpoint)).problems()
    except (OSError, ValueError) as error:
        found.append(f"the checkpoint has no tokenizer that opens: {error}")
    return found


def export(
    checkpoint: QuantizedCheckpoint, target: Path, *, fidelity: Fidelity = "size", tensor_types: str | None = None
) -> ExportReport:
    """Write the checkpoint as the GGUF file `target`; the same checkpoint gives the same bytes.

    Peak memory is a few copies of the largest tensor. The file is written beside its place and renamed when it is
    complete. `tensor_types` names a file for the plan as llama-quantize takes it, written as well.

    Raises InputError for an unknown fidelity, where a file exists, and for what `problems` finds.
    """
    if fidelity not in get_args(Fidelity):
        raise unknown_name("fidelity", fidelity, get_args(Fidelity))
    for place in (target, *([Path(tensor_types)] if tensor_types else ())):
        if place.exists():
            raise InputError(f"{place} exists already; remove it or choose another place")
    if found := problems(checkpoint):
        raise InputError(f"{checkpoint.path} cannot be exported to GGUF: " + "; ".join(found))
    config = _model_config(checkpoint)
    tensors = plan_tensors(checkpoint, config, fidelity)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        steps = _write(checkpoint, config, tensors, partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    notes = _notes(config, tensors)
    if surplus := sorted(checkpoint.model_tensors.surplus):
        notes += (f"{len(surplus)} tensors that the model does not use are left out: {', '.join(surplus[:3])}, ...",)
    if tensor_types:
        notes += (write_tensor_types(checkpoint, config, Path(tensor_types)),)
    return ExportReport(
        path=target,
        size_bytes=target.stat().st_size,
        steps=steps,
        notes=notes,
        unread_settings=unread_settings(config),
    )


def _write(
    checkpoint: QuantizedCheckpoint, config: PreTrainedConfig, tensors: list[GgufTensor], path: Path
) -> dict[str, ModuleStep]:
    """Write the file one tensor at a time; the step of each quantized matrix by its dotted path."""
    with contextlib.closing(gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].name)) as writer:
        _add_metadata(writer, checkpoint, config, tensors)
        for tensor in tensors:
            size_bytes = int(np.prod(tensor.byte_shape))
            writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), size_bytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        steps = {}
        for tensor in tensors:
            rows, step = tensor_rows(checkpoint, config, tensor)
            writer.write_tensor_data(rows)
            if step is not None:
                steps[str(tensor.source)] = step
    return steps


def _add_metadata(
    writer: gguf.GGUFWriter, checkpoint: QuantizedCheckpoint, config: PreTrainedConfig, tensors: list[GgufTensor]
) -> None:
    vocabulary_size = _vocabulary_size(checkpoint)
    kinds = Counter(tensor.kind for tensor in tensors if isinstance(tensor.source, str))
    kinds = kinds or Counter([GGMLQuantizationType.F16])  # nothing is quantized
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[kinds.most_common(1)[0][0]])
    add_metadata(writer, config, vocabulary_size)
    GgufTokenizer(checkpoint.path, vocabulary_size).add_metadata(writer)


def _model_config(checkpoint: QuantizedCheckpoint) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError) as error:
        raise InputError(f"{checkpoint.path}/config.json describes no model that transformers has: {error}") from error


def _vocabulary_size(checkpoint: QuantizedCheckpoint) -> int:
    """Rows of the embedding."""
    return embedding_shape(checkpoint.model_tensors.model)[0]


def _notes(config: PreTrainedConfig, tensors: list[GgufTensor]) -> tuple[str, ...]:
    kept = [tensor for tensor in tensors if not isinstance(tensor.source, str) and len(tensor.shape) > 1]
    return (*(f"{tensor.name} is {tensor.kind.name}, as in the checkpoint" for tensor in kept), *config_notes(config))
