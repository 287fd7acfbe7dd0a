"""A checkpoint as an exporter reads it: one quantized matrix at a time, as codes and grid or as weights."""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.checkpoint.config import LmqConfig
from lmq.checkpoint.open import read_stored_directory
from lmq.checkpoint.verify import expected_tensors
from lmq.checkpoint.write import read_quantization_config
from lmq.formats.gguf_types import BLOCKS_TENSOR, GgufMatrix
from lmq.formats.groups import GRID_TENSORS, Grid, from_groups
from lmq.formats.packing import unpack
from lmq.formats.spec import QuantSpec
from lmq.model.stored import StoredModel
from lmq.model.structure import expert_number
from lmq.model.tensors import FLOAT_TYPES, StoredTensor, read_headers, read_tensors


class QuantizedCheckpoint:
    """The tensors of a checkpoint by the path of their module; nothing is kept in memory.

    Raises InputError where `path` is no checkpoint of lmq.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config: LmqConfig = read_quantization_config(path)

    @cached_property
    def specs(self) -> dict[str, QuantSpec]:
        """Configuration of each quantized matrix, by dotted path."""
        return self.config.specs

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """out_features and in_features of each quantized matrix, by dotted path."""
        return self.config.shapes

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The config.json of the model that was quantized: without `quantization_config`."""
        config = json.loads((self.path / "config.json").read_text("utf-8"))
        return {name: value for name, value in config.items() if name != "quantization_config"}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that most of the unquantized weights are stored in; float32 where none is stored as a float.

        Where embedding and head are quantized too, only vectors are left, and config.json says it if it can.
        """
        named = getattr(torch, str(self.model_config.get("dtype", self.model_config.get("torch_dtype"))), None)
        if self.embeddings and isinstance(named, torch.dtype) and named in FLOAT_TYPES.values():
            return named
        weights: Counter[torch.dtype] = Counter()
        for tensor in self.unquantized.values():
            if tensor.dtype in FLOAT_TYPES:
                weights[FLOAT_TYPES[tensor.dtype]] += tensor.elements
        return weights.most_common(1)[0][0] if weights else torch.float32

    @cached_property
    def model_tensors(self) -> StoredModel:
        """The stored tensors by the names of the model's own: what the files hold beyond them is surplus."""
        return read_stored_directory(self.path)

    @cached_property
    def unquantized(self) -> dict[str, StoredTensor]:
        """Every other tensor (embeddings, norms, biases, head, and what is surplus), as stored, by stored name."""
        return {name: tensor for name, tensor in self._stored.items() if name not in self.quantized_names}

    @cached_property
    def quantized_names(self) -> frozenset[str]:
        """Names of the stored tensors of the quantized matrices."""
        return frozenset(expected_tensors(self.config))

    @cached_property
    def embeddings(self) -> list[str]:
        """Paths of the input embedding and the output head, as far as they are quantized."""
        model = self.model_tensors.model
        around = (model.get_input_embeddings(), model.get_output_embeddings())
        return [path for path in self.specs if any(model.get_submodule(path) is module for module in around)]

    @property
    def experts(self) -> list[str]:
        """Paths of the quantized matrices of routed experts."""
        return [path for path in self.specs if expert_number(path) is not None]

    def codes(self, module_path: str) -> Tensor:
        """Codes of a matrix, uint8 [out_features, in_features]."""
        stored = self._stored[f"{module_path}.codes"]
        spec, shape = self.specs[module_path], self.shapes[module_path]
        groups = unpack(read_tensors([stored])[stored.name], spec.bits).view(-1, spec.group_size)
        return from_groups(groups, shape, self.config.axis)

    def grid(self, module_path: str) -> Grid:
        """The grid of a matrix."""
        stored = {name: self._stored[f"{module_path}.{name}"] for name in GRID_TENSORS}
        values = read_tensors(stored.values())
        tensors = {name: values[tensor.name] for name, tensor in stored.items()}
        return Grid.from_tensors(tensors, self.specs[module_path], self.shapes[module_path], self.config.axis)

    def weight(self, module_path: str) -> Tensor:
        """The dequantized weight, float32 [out_features, in_features]."""
        if self.specs[module_path].gguf is not None:
            return self.blocks(module_path).dequantize()
        grid = self.grid(module_path)
        stored = self._stored[f"{module_path}.codes"]
        codes = unpack(read_tensors([stored])[stored.name], grid.spec.bits)
        return grid.dequantize(codes.view(-1, grid.spec.group_size))

    def blocks(self, module_path: str) -> GgufMatrix:
        """A matrix whose configuration is a type of GGUF."""
        shape, kind = self.shapes[module_path], self.specs[module_path].gguf
        assert kind is not None
        stored = self._stored[f"{module_path}.{BLOCKS_TENSOR}"]
        return GgufMatrix(kind.of_rows(shape[1]), shape, read_tensors([stored])[stored.name])

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        return read_headers(self.path)
