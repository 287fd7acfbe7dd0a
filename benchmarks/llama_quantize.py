"""Files of llama.cpp's own quantizer, judged as `benchmarks.quantizers` judges: mixes of types such as Q4_K_M.

Run `python -m benchmarks.llama_quantize MODEL --calibration TEXT --evaluation TEXT --work DIR` with the package
llama-cpp-python (`pip install 'lmq[llama]'`). MODEL is written as a GGUF file and quantized by `llama_model_quantize`,
which llama-quantize calls, with the importance matrix of the calibration text: the mean square of every input.
Embedding and head stay, as there. The types of the file are read back: bits per weight are those of the block matrices.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from benchmarks.judge import Judge, print_header, print_row, read_tokens
from benchmarks.quantizers import SEQUENCE_LENGTH, WINDOW
from lmq.checkpoint.write import write_checkpoint
from lmq.export.gguf import export
from lmq.export.gguf_model import gguf_name, head_rows
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.gguf_types import GGUF_TYPES, GgufMatrix
from lmq.formats.spec import QuantSpec
from lmq.measurement.quantized_model import GridsOfLayer
from lmq.measurement.quantizer_moments import input_moments
from lmq.measurement.replay import forward_block
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer


def main() -> None:
    options = _arguments()
    directory = Path(options.model)
    model = StreamedModel.open(directory, discover(directory))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    judge = Judge.of(model, read_tokens(tokenizer, options.evaluation, options.windows, WINDOW, None))
    importance = _importance(
        model, read_tokens(tokenizer, options.calibration, options.sequences, SEQUENCE_LENGTH, None)
    )
    options.work.mkdir(parents=True, exist_ok=True)
    full, config = options.work / "full.gguf", AutoConfig.from_pretrained(directory)
    if not full.exists():
        write_checkpoint(options.work / "full", directory, model.structure, {}, quantizer("rtn"))
        export(QuantizedCheckpoint(options.work / "full"), full)
    named = {_name(model, config, module): values for module, values in importance.items()}
    print_header("quantizer")
    for name in options.mixes.split(","):
        path = options.work / f"{name}.gguf"
        if not path.exists():
            quantize_file(full, path, LlamaFileType[f"MOSTLY_{name}"], named)
        matrices = _matrices(model, config, path)
        weights = sum(module.parameters for module in model.structure.modules)
        bits = 8 * sum(matrix.size_bytes for matrix in matrices.values()) / weights
        given = {module: QuantSpec.parse(matrix.kind.name) for module, matrix in matrices.items()}
        print_row(directory.name, "llama-quantize", name, bits, judge.scores(_grids(matrices), given))


def _grids(matrices: Mapping[ModuleId, GgufMatrix]) -> GridsOfLayer:
    by_spec = {module: {QuantSpec.parse(matrix.kind.name): matrix} for module, matrix in matrices.items()}
    return lambda layer: {module: of_module for module, of_module in by_spec.items() if module.layer == layer}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of an unquantized model")
    parser.add_argument("--calibration", required=True, type=Path, help="text of the importance matrix")
    parser.add_argument("--evaluation", required=True, type=Path, help="text to evaluate on")
    parser.add_argument("--work", required=True, type=Path, help="folder for files")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1,024 tokens (default 8)")
    parser.add_argument("--mixes", default="IQ4_XS,Q4_K_S,Q4_K_M", help="default IQ4_XS,Q4_K_S,Q4_K_M")
    return parser.parse_args()


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
    main()
