"""What of a model stays as it is: embeddings, lm_head, norms and biases, by the headers of its checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lmq.model.discovery import build_skeleton, match_tensors
from lmq.model.structure import ModelStructure
from lmq.model.tensors import StoredTensor, read_headers

UNQUANTIZED_PARTS = ("embeddings", "lm_head", "norms", "biases", "other")


@dataclass(frozen=True, kw_only=True)
class UnquantizedPart:
    """Tensors of one of `UNQUANTIZED_PARTS` and their size at the model's dtype; a tied lm_head has none."""

    name: str
    tensors: int
    parameters: int
    size_bytes: int


def unquantized_parts(model_dir: Path, structure: ModelStructure) -> tuple[UnquantizedPart, ...]:
    """Split `structure.other_bytes` by what the tensors are; reads no weights.

    Raises InputError, UnsupportedModel as `lmq.model.discovery.discover` does.
    """
    model = build_skeleton(model_dir)
    stored = match_tensors(model, read_headers(model_dir))
    quantized = {f"{structure.path(module.id)}.weight" for module in structure.modules}
    sizes: dict[str, list[int]] = defaultdict(list)
    for name, tensor in stored.items():
        if name not in quantized and not _is_tied(model, name, stored):
            sizes[_part_of(model, name)].append(tensor.elements)
    item_bytes = getattr(torch, structure.dtype).itemsize
    return tuple(
        UnquantizedPart(
            name=part,
            tensors=len(sizes[part]),
            parameters=sum(sizes[part]),
            size_bytes=sum(sizes[part]) * item_bytes,
        )
        for part in UNQUANTIZED_PARTS
    )


def _is_tied(model: PreTrainedModel, name: str, stored: Mapping[str, StoredTensor]) -> bool:
    source = model.all_tied_weights_keys.get(name)
    return source is not None and stored[name] == stored[source]


def _part_of(model: PreTrainedModel, name: str) -> str:
    path, _, tensor = name.rpartition(".")
    owner = model.get_submodule(path)
    if owner is model.get_output_embeddings():
        return "lm_head"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    return "biases" if tensor == "bias" else "other"
