"""llama-quantize: mixes of types such as Q4_K_M, with the importance matrix of the calibration text.

The model is written as a GGUF file and quantized by `llama_model_quantize`, which llama-quantize calls; the importance
matrix is the mean square of every input. Embedding and head stay. The types are read back from the file, and what rows
that are no multiple of 256 take instead of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.peers.job import Job, Quantized, run
from lmq.checkpoint.write import write_checkpoint
from lmq.export.gguf import export
from lmq.export.gguf_model import gguf_name, head_rows
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.gguf_types import GGUF_TYPES, GgufMatrix
from lmq.measurement.quantizer_moments import input_moments
from lmq.measurement.replay import forward_block
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer


def quantize(job: Job) -> Quantized:
    directory, work = Path(job.model), Path(job.out).parent
    model, config = StreamedModel.open(directory, discover(directory)), AutoConfig.from_pretrained(directory)
    importance = {
        _name(model, config, module): values for module, values in _importance(model, job.token_ids()).items()
    }
    full, path = work / "full.gguf", work / f"{job.options['mix']}.gguf"
    if not full.exists():
        write_checkpoint(work / "full", directory, model.structure, {}, quantizer("rtn"))
        export(QuantizedCheckpoint(work / "full"), full)
    quantize_file(full, path, LlamaFileType[f"MOSTLY_{job.options['mix']}"], importance)
    matrices = _matrices(model, config, path)
    weights = {model.structure.path(module): matrix.dequantize() for module, matrix in matrices.items()}
    stored = 8 * sum(matrix.size_bytes for matrix in matrices.values())
    return Quantized(weights, stored / sum(module.parameters for module in model.structure.modules))


def _importance(model: StreamedModel, tokens: Tensor) -> dict[ModuleId, Tensor]:
    """Mean square of every input of every module, float32 [in_features]."""
    found = {}
    inputs, hidden = model.block_inputs(tokens.shape[1]), model.embed(tokens)
    for layer in range(model.structure.layers):
        modules = model.structure.in_layer(layer)
        with model.block(layer) as block:
            moments = input_moments(block, inputs[layer], hidden, [module.id.kind for module in modules])
            hidden = forward_block(block, inputs[layer], hidden, layer=layer)
        found |= {module.id: moments[module.id.kind].matrix().diagonal().float() for module in modules}
    return found


def quantize_file(source: Path, target: Path, kind: LlamaFileType, importance: Mapping[str, Tensor]) -> None:
    """What `llama-quantize --imatrix` does, with embedding and head left in float16."""
    import llama_cpp

    arrays = {name: np.ascontiguousarray(values.numpy(), np.float32) for name, values in importance.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one stays empty
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters: Any = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(kind), torch.get_num_threads()
    parameters.token_embedding_type = parameters.output_tensor_type = int(GGMLQuantizationType.F16)
    parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert not failed, f"llama.cpp could not quantize {source}"


def _matrices(model: StreamedModel, config: PreTrainedConfig, path: Path) -> dict[ModuleId, GgufMatrix]:
    """The block matrices of a file, with their rows in the order of the model."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for module in model.structure.modules:
        name = _name(model, config, module.id)
        tensor, order = tensors[name], head_rows(config, name)
        rows = np.array(tensor.data).reshape(module.out_features, -1)
        if order is not None:
            heads = rows.reshape(len(order), -1)
            restored = np.empty_like(heads)
            restored[order] = heads
            rows = restored.reshape(rows.shape)
        kind = GGUF_TYPES[tensor.tensor_type.name.lower()]
        found[module.id] = GgufMatrix(kind, (module.out_features, module.in_features), torch.from_numpy(rows))
    return found


def _name(model: StreamedModel, config: PreTrainedConfig, module: ModuleId) -> str:
    return str(gguf_name(config, f"{model.structure.path(module)}.weight"))


if __name__ == "__main__":
    run(quantize)
