"""Single matrices of a model directory: those of a layer, and an embedding some rows at a time."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lmq.errors import InputError
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.structure import ModelStructure, ModuleInfo
from lmq.model.tensors import StoredTensor, weight_files
from lmq.numerics import require_finite

_MATRIX_ELEMENTS_AT_ONCE = 1 << 22
"""Weights of an embedding that are held in float32 at a time."""


def load_layer_weights(
    model_dir: Path, structure: ModelStructure, layer: int, kinds: Container[str] | None = None
) -> dict[str, Tensor]:
    """Weights of one layer's modules, or of those of some `kinds`, kind -> float32 [out_features, in_features].

    Of the kinds of one expert, no other expert is read that is stored apart.
    Raises NotFiniteError naming layer and module, InputError for a tensor that is not in the checkpoint.
    """
    stored = _stored_model(model_dir)
    modules = [info.id for info in structure.in_layer(layer) if kinds is None or info.id.kind in kinds]
    names = {module.kind: f"{structure.path(module)}.weight" for module in modules}
    lacking = [kind for kind, name in names.items() if not stored.holds(name)]
    if lacking:
        raise InputError(f"{model_dir} has no weight of layer {layer} {lacking[0]}; is it the model of this structure?")
    values = stored.read(names.values())
    for kind, name in names.items():
        require_finite(values[name], f"the weight of layer {layer} {kind}")
    return {kind: values[name].float() for kind, name in names.items()}


class StoredMatrix:
    """One matrix of a model directory, read some rows at a time: an embedding may be too large for float32."""

    def __init__(self, tensor: StoredTensor, name: str):
        self._tensor = tensor
        self._name = name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self._tensor.shape
        return rows, columns

    def blocks(self, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """The rows and their values, float32 [rows, columns], block by block, each but the last a `multiple` of rows.

        Raises NotFiniteError naming the matrix.
        """
        rows, columns = self.shape
        step = multiple * max(1, _MATRIX_ELEMENTS_AT_ONCE // (columns * multiple))
        with safe_open(self._tensor.file, framework="pt") as file:
            stored = file.get_slice(self._tensor.name)
            for first in range(0, rows, step):
                block = stored[first : min(first + step, rows)]
                require_finite(block, self._name)
                yield slice(first, first + len(block)), block.float()


def stored_matrix(model_dir: Path, structure: ModelStructure, module: ModuleInfo) -> StoredMatrix:
    """The weight of a module as stored. Raises InputError for one that is not in the checkpoint."""
    name = f"{structure.path(module.id)}.weight"
    tensors = _stored_model(model_dir).tensors
    if name not in tensors:
        raise InputError(f"{model_dir} has no {name}; is it the model of this structure?")
    return StoredMatrix(tensors[name], f"the weight of {module.id}")


def _stored_model(model_dir: Path) -> StoredModel:
    files = (model_dir / "config.json", *weight_files(model_dir))
    return _stored_model_of(model_dir, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=2)
def _stored_model_of(model_dir: Path, _: tuple[tuple[Path, int, int], ...]) -> StoredModel:
    """Where a model's tensors lie, found once while its files (name, size, modification time) stay as they are."""
    return read_stored_model(model_dir)
