"""Importance matrices of llama.cpp: what llama-quantize weights the columns of every matrix by.

The file is a GGUF of its own kind, as llama-imatrix writes it: `NAME.in_sum2` float32 [1, in_features], sums over
tokens, and `NAME.counts` float32 [1, 1], by which they are divided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig

from lmq.errors import InputError
from lmq.export.gguf_model import config_problems, gguf_name


class _Writer(gguf.GGUFWriter):
    def add_architecture(self) -> None:
        """Such a file names none."""


def write_imatrix(
    path: Path, config: PreTrainedConfig, importance: Mapping[str, Tensor], *, text: str, sequence_length: int
) -> None:
    """Write the importance float [in_features] of matrices by their dotted paths, scaled to a mean of 1 each.

    Only ratios within a matrix count. `text` and the tokens of a sequence are said in the file. Raises InputError where
    `path` exists, for a model that llama.cpp computes otherwise, and for a matrix without importance.
    """
    if path.exists():
        raise InputError(f"{path} exists already; remove it or choose another place")
    if found := list(config_problems(config)):
        raise InputError(f"llama.cpp has no such model: {'; '.join(found)}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with contextlib.closing(_Writer(partial, "")) as writer:
            writer.add_type(gguf.GGUFType.IMATRIX)
            writer.add_array(gguf.Keys.IMatrix.DATASETS, [text])
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 1)
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, sequence_length)
            for module, values in sorted(importance.items()):
                mean = float(values.double().mean())
                if not mean > 0:
                    raise InputError(f"nothing came into {module} on the calibration text; give it more text")
                name = gguf_name(config, f"{module}.weight")
                scaled = (values.double() / mean).float().numpy()
                writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(scaled)[None])
                writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
