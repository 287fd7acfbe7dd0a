"""What of a model stays as it is: embeddings, lm_head, norms, biases, towers, by the headers of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lmq.model.stored import read_stored_model
from lmq.model.structure import ModelStructure
from lmq.model.tensors import StoredTensor, size_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNQUANTIZED_PARTS = ("embeddings", "lm_head", "norms", "biases", "other", "beside", "surplus")
"""`beside` is what lies beside the language model, as a tower for images, whatever it consists of; `surplus` what the
model's class does not use, such as layers that predict further tokens. Checkpoints keep both."""


@dataclass(frozen=True, kw_only=True)
class UnquantizedPart:
    """Tensors of one of `UNQUANTIZED_PARTS` and the bytes that they are stored in; a tied lm_head has none."""

    name: str
    tensors: int
    parameters: int
    size_bytes: int


def unquantized_parts(model_dir: Path, structure: ModelStructure) -> tuple[UnquantizedPart, ...]:
    """Split `structure.other_bytes` by what the tensors are; reads no weights.

    Raises InputError, UnsupportedModel as `lmq.model.discovery.discover` does.
    """
    stored = read_stored_model(model_dir)
    replaced = stored.stored_names(f"{structure.path(module.id)}.weight" for module in structure.quantized)
    members: dict[str, list[StoredTensor]] = {part: [] for part in UNQUANTIZED_PARTS}
    for name, tensor in stored.headers.items():
        if name not in replaced:
            owner = stored.owner.get(name)
            members["surplus" if owner is None else _part_of(stored.model, owner, structure)].append(tensor)
    return tuple(
        UnquantizedPart(
            name=part,
            tensors=len(tensors),
            parameters=sum(tensor.elements for tensor in tensors),
            size_bytes=sum(size_bytes(tensor) for tensor in tensors),
        )
        for part, tensors in members.items()
    )


def _part_of(model: PreTrainedModel, name: str, structure: ModelStructure) -> str:
    if name.startswith(tuple(f"{part.path}." for part in structure.kept_parts)):
        return "beside"
    path, _, tensor = name.rpartition(".")
    owner = model.get_submodule(path)
    if owner is model.get_output_embeddings():
        return "lm_head"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    return "biases" if tensor == "bias" else "other"
