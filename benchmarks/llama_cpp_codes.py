"""Codes as llama.cpp's own quantizer finds them, for comparison: the function that llama-quantize calls per tensor.

Needs the package llama-cpp-python (`pip install lmq[llama]`). The importance matrix is what llama-imatrix collects: the
mean square of every input, the diagonal of plain second moments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.gguf_types import GgufMatrix, GgufType
from lmq.formats.spec import QuantSpec
from lmq.quantizers.calibrated import gguf_types_of


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
