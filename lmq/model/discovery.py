"""What a model is made of, found in the model itself: no table of architectures, and no weight is read.

The model is built from its configuration without memory for its weights. The decoder blocks are the ModuleList
with the most parameters; every nn.Linear inside a block is a module that can be quantized, and so is every matrix of
an expert (`lmq.model.experts`). Routers are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmq.errors import InputError, UnsupportedModel
from lmq.model.auto_class import loss_of
from lmq.model.experts import RoutedExperts, is_router
from lmq.model.losses import Contrastive
from lmq.model.parts_beside import is_part_of, kept_parts, largest_list, left_beside, places_beside, towers_beside
from lmq.model.source import ModelSource, locate, source_digest
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.structure import (
    DTYPE_BYTES,
    EMBEDDINGS,
    KeptTensor,
    ModelStructure,
    ModuleId,
    ModuleInfo,
    Tower,
    expert_number,
)
from lmq.model.tensors import StoredTensor, size_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def discover(
    model_dir: Path,
    *,
    weights_sha256: str | None = None,
    kept: Collection[ModuleId] = (),
    embeddings: bool = False,
    beside: Sequence[str] = (),
) -> ModelStructure:
    """Discover the structure of a safetensors checkpoint from its configuration and headers.

    With `embeddings` the input embedding and the output head are to be quantized too. So are the matrices beside a
    language model that a pattern of `beside` names, as `vision_tower.*`; what is no such pattern changes nothing.

    `weights_sha256` is the digest of the model, computed here when it is not given. Modules that are `kept` are not
    quantized, as if they were no nn.Linear. Raises UnsupportedModel naming what cannot be quantized (blocks most of
    whose weights are outside nn.Linear: Conv1D; experts of an unknown layout; a checkpoint that is quantized already;
    tensors that are missing), InputError for damaged files.
    """
    stored = read_stored_model(model_dir)
    model = stored.model
    towers = find_towers(model)
    places = places_beside(stored, towers[0].layers_path)
    towers += towers_beside(model, places, beside)
    kept = {*kept, *left_beside(model, towers, beside)}
    blocks = list(_blocks(model, towers, kept))
    layers_path, hidden_size = towers[0].layers_path, towers[0].hidden_size
    kept_tensors = tuple(_kept(blocks, kept))
    modules = tuple(_modules(blocks))
    tied = any(stored.tensors[name] == stored.tensors[source] for name, source in model.all_tied_weights_keys.items())
    around = tuple(_embeddings(stored, hidden_size)) if embeddings else ()
    quantized = [f"{blocks[info.id.layer].path}.{info.id.kind}.weight" for info in modules]
    dtype = _common_dtype(stored, quantized)
    quantized += [f"{info.id.kind}.weight" for info in around]
    source_bytes = sum(stored.stored_bytes(name) for name in quantized)
    is_mixed = source_bytes != DTYPE_BYTES[dtype] * sum(info.parameters for info in modules + around)
    replaced = stored.stored_names(quantized)
    others = [tensor for name, tensor in stored.headers.items() if name not in replaced]
    if weights_sha256 is None:
        weights_sha256 = source_digest(locate(ModelSource(kind="directory", place=str(model_dir))))
    return ModelStructure(
        architecture=type(model).__name__,
        dtype=dtype,
        layers_path=layers_path,
        layers=modules[-1].id.layer + 1,
        hidden_size=hidden_size,
        vocabulary_size=_output_size(model, hidden_size),
        tied_embeddings=tied,
        modules=modules,
        other_parameters=sum(tensor.elements for tensor in others),
        other_bytes=sum(size_bytes(tensor) for tensor in others),
        weights_sha256=weights_sha256,
        kept=kept_tensors,
        stored_bytes=source_bytes if is_mixed else None,
        embeddings=around,
        loss=loss_of(model.config).name,
        kept_parts=tuple(kept_parts(stored, places, replaced)),
        several_towers=tuple(towers) if len(towers) > 1 else (),
    )


def embedding_shape(model: PreTrainedModel) -> torch.Size:
    """Shape [vocabulary, embedding] of the table of token embeddings, dense or quantized."""
    table: Any = model.get_input_embeddings()
    return torch.Size((table.num_embeddings, table.embedding_dim))


def _output_size(model: PreTrainedModel, hidden_size: int) -> int:
    """Outputs of the head: the vocabulary, the classes of a classifier, or the numbers of an embedding."""
    loss = loss_of(model.config)
    if loss.per_token:
        return embedding_shape(model)[0]
    config: Any = model.config
    return int(config.num_labels if loss.has_classes else getattr(config, "projection_dim", hidden_size))


def find_towers(model: PreTrainedModel) -> list[Tower]:
    """The towers of a model: one, or that of images and that of texts.

    Raises UnsupportedModel for models of two towers that have not what CLIP and SigLIP have.
    """
    loss, config = loss_of(model.config), model.config
    if loss.name != Contrastive.name:
        path = find_layers(model)
        own: Any = config.get_text_config() if loss.per_token else getattr(config, "vision_config", config)
        return [Tower(path, len(model.get_submodule(path)), own.hidden_size)]  # type: ignore[arg-type]
    towers = []
    for part, features, input_name in (
        ("vision", "get_image_features", "pixel_values"),
        ("text", "get_text_features", "input_ids"),
    ):
        tower, own = getattr(model, f"{part}_model", None), getattr(config, f"{part}_config", None)
        if tower is None or own is None or not hasattr(model, features):
            raise UnsupportedModel(
                f"{type(model).__name__} has no {part}_model, {part}_config or {features}, which models of two towers "
                "have (CLIP, SigLIP); lmq does not know its layout"
            )
        layers_path = largest_list(model, f"{part}_model")
        if layers_path is None:
            raise UnsupportedModel(f"{part}_model of {type(model).__name__} has no list of blocks")
        blocks: Any = model.get_submodule(layers_path)
        towers.append(Tower(layers_path, len(blocks), own.hidden_size, features, input_name))
    return towers


def embed_scale(table: nn.Module) -> float:
    """What a table of token embeddings multiplies its rows by, as those of Gemma do; 1 for others."""
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def _embeddings(stored: StoredModel, hidden_size: int) -> Iterator[ModuleInfo]:
    """Input embedding and output head as modules; one where they are one matrix.

    Raises UnsupportedModel for tables that are looked up or multiplied in another way than nn.Embedding, with a scale
    at most, and nn.Linear do it, or that something else shares.
    """
    model = stored.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    scaled = type(table).forward is not nn.Embedding.forward and not hasattr(table, "embed_scale")
    if not isinstance(table, nn.Embedding) or scaled or table.max_norm is not None:
        raise UnsupportedModel(
            f"{paths[id(table)]} is a {type(table).__name__}, which looks rows up in its own way; leave out embeddings"
        )
    if not isinstance(head, nn.Linear) or id(head) not in paths:
        raise UnsupportedModel(
            f"the output head of {type(model).__name__} is a {type(head).__name__}, no nn.Linear; leave out embeddings"
        )
    names = {f"{paths[id(table)]}.weight": "embedding", f"{paths[id(head)]}.weight": "head"}
    _common_dtype(stored, list(names))
    by_tensor: dict[StoredTensor, list[str]] = {}
    for name in names:
        by_tensor.setdefault(stored.tensors[name], []).append(name)
    for tensor, members in by_tensor.items():
        sharing = [name for name, found in stored.tensors.items() if found == tensor and name not in names]
        if sharing:
            raise UnsupportedModel(f"{sharing[0]} shares the matrix of {members[0]}; leave out embeddings")
        shape = model.get_parameter(members[0]).shape
        if shape[1] != hidden_size:
            raise UnsupportedModel(
                f"{members[0]} has rows of {shape[1]} where the hidden size is {hidden_size}; leave out embeddings"
            )
        part = "tied" if len(members) > 1 else names[members[0]]
        yield ModuleInfo(ModuleId(EMBEDDINGS, members[0].removesuffix(".weight")), shape[0], shape[1], part)


def find_layers(model: PreTrainedModel) -> str:
    """Path of the list of decoder blocks: of the lists nearest to the table of token embeddings, the largest.

    Nearest is what lies under the innermost module that holds both, whatever it is called: beside a tower for images
    the text's own blocks, in a model whose head is named `decoder` the blocks and not the head.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    place = paths[id(model.get_input_embeddings())]
    while True:
        place = place.rpartition(".")[0]
        found = largest_list(model, place)
        if found is not None:
            return found
        if not place:
            raise UnsupportedModel(f"{type(model).__name__} has no list of decoder blocks, which lmq works through")


LinearModules = Mapping[str, nn.Linear]
"""The nn.Linear modules of a block that are quantized, by their names inside it."""


def _linear_modules(block: nn.Module, layer: int, kept: Collection[ModuleId]) -> LinearModules:
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and ModuleId(layer, path) not in kept and not is_router(block, path)
    }


@dataclass(frozen=True, eq=False)
class _Block:
    """A block with its layer, its path, and the modules in it that are quantized."""

    layer: int
    path: str
    module: nn.Module
    linear: LinearModules
    hidden_size: int


def _blocks(model: PreTrainedModel, towers: Sequence[Tower], kept: Collection[ModuleId]) -> Iterator[_Block]:
    """The blocks of all towers, one after the other."""
    layer = 0
    for tower in towers:
        for path in map(tower.block_path, range(tower.layers)):
            block = model.get_submodule(path)
            yield _Block(layer, path, block, _linear_modules(block, layer, kept), tower.hidden_size)
            layer += 1


def _modules(blocks: Sequence[_Block]) -> Iterator[ModuleInfo]:
    for block in blocks:
        if not block.linear:
            raise UnsupportedModel(f"{block.path} ({type(block.module).__name__}) holds no nn.Linear to quantize")
        parts = _parts(block.linear, block.hidden_size, block_path=block.path)
        for kind, module in block.linear.items():
            yield ModuleInfo(ModuleId(block.layer, kind), module.out_features, module.in_features, parts[kind])


def left_out(structure: ModelStructure, patterns: Sequence[str]) -> tuple[ModuleId, ...]:
    """The modules that no pattern over LAYER.KIND matches, such as `*.mlp.*`: what is to be kept as it is.

    What lies beside a language model is in a structure only where a pattern names it, for which `discover` is given the
    patterns. Raises InputError for a pattern that matches nothing, and for a layer that would have no module left.
    """
    layers = range(structure.layers_beside.start)
    names = {info.id: f"{info.id.layer}.{info.id.kind}" for info in structure.modules if info.id.layer in layers}
    for pattern in patterns:
        of_part = any(is_part_of(pattern, part) for part in structure.parts_beside)
        if not of_part and not any(fnmatchcase(name, pattern) for name in names.values()):
            parts = "".join(f", and {part.path}.*" for part in structure.kept_parts)
            raise InputError(
                f"modules: {pattern!r} matches nothing of {structure.architecture}, whose modules are "
                f"{', '.join(structure.kinds[:8])}{', ...' if len(structure.kinds) > 8 else ''} of each layer, as in "
                f"{next(iter(names.values()))!r}{parts}"
            )
    taken = {module for module, name in names.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for layer in layers:
        if not any(module.layer == layer for module in taken):
            raise InputError(
                f"modules: {', '.join(patterns)} leave layer {layer} without a module; take one of each layer, or all "
                "by a further pattern '*'"
            )
    return tuple(module for module in names if module not in taken)


def _kept(blocks: Sequence[_Block], kept: Collection[ModuleId]) -> Iterator[KeptTensor]:
    """Tensors of blocks that stay as they are: convolutions and state matrices of a hybrid, beside its projections.

    Raises UnsupportedModel where they are most of a block's weights (Conv1D, experts of an unknown layout).
    """
    for block in blocks:
        others = {
            (path, name): (type(module).__name__, parameter)
            for path, module in block.module.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1 and path not in block.linear and not isinstance(module, RoutedExperts)
        }
        weights = sum(module.weight.numel() for module in block.linear.values())
        unknown = {place: found for place, found in others.items() if ModuleId(block.layer, place[0]) not in kept}
        if unknown and sum(parameter.numel() for _, parameter in unknown.values()) >= weights:
            (path, name), (kind, parameter) = next(iter(unknown.items()))
            raise UnsupportedModel(
                f"{block.path}.{path} is a {kind} with {name} of shape {list(parameter.shape)}; lmq quantizes "
                "nn.Linear, and experts [experts, out_features, in_features] with transformers' experts interface (no "
                "Conv1D, no other layout of experts), and most weights of this block are in neither"
            )
        for (path, name), (_, parameter) in others.items():
            yield KeptTensor(block.layer, f"{path}.{name}".removeprefix("."), tuple(parameter.shape))


def _parts(linear: LinearModules, hidden_size: int, block_path: str) -> dict[str, str]:
    """The part of each module kind of one block.

    Modules below a submodule named for attention are attention, the others MLP. The way out of either is the
    module registered last of those with `hidden_size` outputs; all others are the way in. Every routed expert has a
    way in and a way out of its own.
    """
    attention = [kind for kind in linear if re.search("attn|attention", kind.rpartition(".")[0])]
    groups = [(attention, "attn_in", "attn_out")]
    by_expert: dict[int | None, list[str]] = {}
    for kind in linear:
        if kind not in attention:
            by_expert.setdefault(expert_number(kind), []).append(kind)
    groups += [(kinds, "mlp_gate", "mlp_down") for kinds in by_expert.values()]
    parts: dict[str, str] = {}
    for kinds, way_in, way_out in groups:
        outputs = [kind for kind in kinds if linear[kind].out_features == hidden_size]
        if kinds and not outputs:
            raise UnsupportedModel(
                f"{block_path}: none of {', '.join(kinds)} leads back to the hidden size {hidden_size}"
            )
        parts.update({kind: way_out if kind == outputs[-1] else way_in for kind in kinds})
    return parts


def _common_dtype(stored: StoredModel, names: Sequence[str]) -> str:
    """The type that most of the matrices are stored in. Raises UnsupportedModel for one that cannot be quantized."""
    counts: Counter[str] = Counter()
    for name in names:
        if name in stored.conversions:
            sources = ", ".join(tensor.name for tensor, _ in stored.conversions[name].sources[:3])
            raise UnsupportedModel(
                f"{name} is not stored as the model uses it, but computed from {sources}; open the model with "
                "transformers, save it with save_pretrained(..., save_original_format=False), and pass that"
            )
        types = stored.types(name)
        if unknown := sorted(types - _FLOAT_TYPES.keys()):
            raise UnsupportedModel(
                f"{name} is stored as {unknown[0]}; lmq reads {', '.join(_FLOAT_TYPES)}; pass the full-precision model"
            )
        counts[_FLOAT_TYPES[min(types)]] += 1
    return counts.most_common(1)[0][0]
