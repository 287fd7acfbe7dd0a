"""Codes as llama.cpp's own quantizer finds them, and those of lmq in the same types: errors of single matrices.

Needs the package llama-cpp-python (`pip install 'lmq[llama]'`), whose function is the one that llama-quantize calls
for every tensor. Its importance matrix is what llama-imatrix collects: the mean square of every input, the diagonal of
plain second moments.

Run `python -m benchmarks.llama_cpp_codes MODEL --calibration TEXT --other TEXT --layers 10,11,12`. Both quantizers see
plain second moments H of the calibration text. Printed is tr(E H Eᵀ) / tr(W H Wᵀ), the share of the outputs that is
lost, with H of the calibration text and with H of the other one, over all matrices of these layers together.
`benchmarks.quantizers --quantizers llama.cpp,fisher-gptq` compares whole models, with Fisher-weighted moments.
"""

from __future__ import annotations

import argparse
import ctypes
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.judge import read_tokens
from lmq.errors import InputError
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.gguf_types import GGUF_TYPES, LLAMA_CPP_TYPES, GgufMatrix, GgufType
from lmq.formats.spec import QuantSpec
from lmq.measurement.quantizer_moments import input_moments
from lmq.measurement.replay import forward_block
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from lmq.quantizers.calibrated import gguf_types_of

QUANTIZERS = ("llama.cpp", "weighted", "gptq", "fisher-gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of an unquantized model")
    parser.add_argument("--calibration", required=True, type=Path, help="text that the quantizers see")
    parser.add_argument("--other", required=True, type=Path, help="text that they do not see")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 512 tokens of each text (default 8)")
    parser.add_argument("--layers", default="10,11,12", help="layers whose matrices are quantized (default 10,11,12)")
    parser.add_argument("--types", default=",".join(LLAMA_CPP_TYPES), help="default: all")
    options = parser.parse_args()
    layers = sorted(map(int, options.layers.split(",")))
    model = StreamedModel.open(options.model, discover(options.model))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        read_tokens(tokenizer, path, options.sequences, 512, None) for path in (options.calibration, options.other)
    ]
    seen, other = (_moments(model, tokens, layers) for tokens in texts)
    found: dict[tuple[str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    whole: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    menu = [QuantSpec.parse(name) for name in options.types.split(",")]
    for layer in layers:
        weights = load_layer_weights(options.model, model.structure, layer)
        for module in model.structure.in_layer(layer):
            weight, judges = weights[module.id.kind].float(), (seen[module.id], other[module.id])
            for kind in gguf_types_of(menu, module.in_features):
                whole[kind.name] += torch.tensor([_energy(weight, moments) for moments in judges])
            specs = [QuantSpec.parse(kind.name) for kind in gguf_types_of(menu, module.in_features)]
            for name in QUANTIZERS:
                chosen: Any = LlamaCpp() if name == LlamaCpp.name else quantizer(name)
                (by_spec,) = chosen.quantize(weight[None], seen[module.id][None], specs)
                for spec, matrix in by_spec.items():
                    error = matrix.round_trip(weight) - weight
                    found[spec.name, name] += torch.tensor([_energy(error, moments) for moments in judges])
    print("| type | " + " | ".join(f"{name}: calibration / other" for name in QUANTIZERS) + " |")
    print("|---|" + "---:|" * len(QUANTIZERS))
    for kind_name, total in sorted(whole.items(), key=lambda item: GGUF_TYPES[item[0]].bits_per_weight):
        shares = [(found[kind_name, name] / total).tolist() for name in QUANTIZERS]
        print(f"| {kind_name} | " + " | ".join(f"{a:.3e} / {b:.3e}" for a, b in shares) + " |", flush=True)


def _moments(model: StreamedModel, tokens: Tensor, layers: Sequence[int]) -> dict[ModuleId, Tensor]:
    """Plain second moments of every matrix of these layers."""
    found = {}
    inputs, hidden = model.block_inputs(tokens.shape[1]), model.embed(tokens)
    for layer in range(max(layers) + 1):
        with model.block(layer) as block:
            if layer in layers:
                kinds = [module.id.kind for module in model.structure.in_layer(layer)]
                for kind, triangle in input_moments(block, inputs[layer], hidden, kinds).items():
                    found[ModuleId(layer, kind)] = triangle.matrix()
            if layer < max(layers):
                hidden = forward_block(block, inputs[layer], hidden, layer=layer)
    return found


def _energy(matrix: Tensor, moments: Tensor) -> float:
    return float(((matrix @ moments).double() * matrix.double()).sum())


class LlamaCpp:
    """llama.cpp's codes with an importance matrix from the same text; stands where a calibrated quantizer does."""

    name: ClassVar[str] = "llama.cpp"
    fisher_weighted: ClassVar[bool] = False
    axis: ClassVar[int] = 1
    integer_zeros: ClassVar[bool] = False

    def quantize(
        self, weights: Tensor, moments: Tensor, menu: Sequence[QuantSpec]
    ) -> list[dict[QuantSpec, EncodedMatrix]]:
        """Every matrix in every type of the menu."""
        found: list[dict[QuantSpec, EncodedMatrix]] = [{} for _ in weights]
        for kind, specs in gguf_types_of(menu, weights.shape[2]).items():
            for by_spec, weight, matrix in zip(found, weights, moments, strict=True):
                by_spec |= dict.fromkeys(specs, llama_cpp_matrix(weight, matrix.diagonal(), kind))
        return [{spec: by_spec[spec] for spec in menu} for by_spec in found]

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name}


def llama_cpp_matrix(weight: Tensor, importance: Tensor, kind: GgufType) -> GgufMatrix:
    """The matrix [out_features, in_features] as llama-quantize writes it; `importance` [in_features]."""
    values = np.ascontiguousarray(weight.float().numpy())
    by_input = np.ascontiguousarray(importance.float().numpy())
    rows, columns = values.shape
    stored = np.zeros((rows, columns // kind.block_size * kind.block_bytes), np.uint8)
    written = _library().ggml_quantize_chunk(
        kind.number, values.ctypes.data, stored.ctypes.data, 0, rows, columns, by_input.ctypes.data
    )
    assert written == stored.size
    return GgufMatrix(kind, (rows, columns), torch.from_numpy(stored))


@cache
def _library() -> Any:
    package = find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise InputError("the package llama-cpp-python is not installed; pip install 'lmq[llama]'")
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("lib/libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return library


if __name__ == "__main__":
    main()
