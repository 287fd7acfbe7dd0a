"""Depth pruning: which layers to leave out, and the shallower checkpoint without them.

Layers are ranked and the lowest taken. (The AVSS authors' program cumulates its scores before it sorts them, and
so takes a prefix of the network whatever the scores say.) A pruned checkpoint is a plain model directory: the
remaining blocks are renumbered, everything else is copied bit for bit, and transformers opens it as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from lmq.checkpoint.reopen import check_opens, sample_logits
from lmq.errors import InputError, NotFiniteError, UnsupportedModel
from lmq.layers.renumbering import check_function
from lmq.model.directory import complete_directory, copy_companions, write_json
from lmq.model.skeleton import read_model_config
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.tensors import INDEX_FILE, SINGLE_FILE

_ROUNDING = 1e-9
"""0.29 · 100 is just below 29 in floating point."""
_NOT_PER_LAYER = ("architectures", "_token_id")
"""Endings of configuration lists that have nothing to do with layers, whatever their length."""


def layers_to_remove(layers: int, fraction: float) -> int:
    """How many layers a fraction of them is, rounded down. Raises InputError when that is none, or not in (0, 1)."""
    if not 0 < fraction < 1:
        raise InputError(f"fraction = {fraction} is not allowed; give a number between 0 and 1, as 0.25")
    count = math.floor(fraction * layers + _ROUNDING)
    if count == 0:
        raise InputError(
            f"a fraction of {fraction} of {layers} layers removes none; the smallest that removes one is "
            f"{math.ceil(1e4 / layers) / 1e4:g}"
        )
    return min(count, layers - 1)


def choose_layers(scores: Sequence[float | None], fraction: float) -> list[int]:
    """The layers of lowest importance, rising; among equal scores the first ones. Any layer can be chosen.

    `scores` has one number per layer. Raises InputError for a fraction that cannot be used or a layer without a
    score, NotFiniteError for a score that is not finite.
    """
    count = layers_to_remove(len(scores), fraction)
    measured: list[float] = []
    for layer, score in enumerate(scores):
        if score is None:
            raise InputError(f"layer {layer} has no score; measure every layer before choosing among them")
        if not math.isfinite(score):
            raise NotFiniteError(f"the score of layer {layer} is {score}; measure it again")
        measured.append(score)
    return sorted(sorted(range(len(measured)), key=lambda layer: measured[layer])[:count])


def choose_random_layers(layers: int, fraction: float, *, seed: int = 42) -> list[int]:
    """As many layers drawn at random, rising: what a metric must beat."""
    if seed < 0:
        raise InputError(f"seed = {seed} is negative; give 0 or more")
    drawn = np.random.default_rng(seed).choice(layers, size=layers_to_remove(layers, fraction), replace=False)
    return sorted(drawn.tolist())


def choose_contiguous_layers(distances: Sequence[float], block_layers: int) -> list[int]:
    """The block of neighbouring layers with the lowest angular distance; among equal ones the first.

    `distances` is by the block's first layer (`lmq.layers.importance.cosine.angular_distances`), for `block_layers`
    layers as `layers_to_remove` gives them. Source: Gromov et al. 2024 (arXiv 2403.17887).
    """
    if block_layers < 1 or not distances or not np.isfinite(distances).all():
        raise InputError(
            f"no block of {block_layers} layers can be chosen from {len(distances)} distances; "
            "give a finite distance for every block of at least one layer"
        )
    first = int(np.argmin(distances))
    return list(range(first, first + block_layers))


def check_prunable(model_dir: Path, structure: ModelStructure, count: int = 1) -> None:
    """Raise UnsupportedModel when the model of `model_dir` is another one without its first `count` layers.

    That is where its configuration cannot be written for fewer layers, or what remains computes something else in its
    new place. Reads the model once, block by block.
    """
    kept = range(count, structure.layers)
    check_function(model_dir, structure, _pruned_config(model_dir, structure, kept), kept)


def write_pruned(model_dir: Path, structure: ModelStructure, removed: Collection[int], target: Path) -> None:
    """Write the model of `model_dir` without the layers `removed` as the model directory `target`.

    The shards of the source are read and written one at a time. Tensors that the model's class does not have, such as
    layers that predict further tokens, are left out. The directory appears when it is complete, opens by plain
    `from_pretrained`, and gives the logits of the source without these layers.

    Raises:
        InputError: `target` exists, or `removed` is empty, holds all layers or one that there is not.
        UnsupportedModel: the configuration does not say how many layers there are, or holds a list of layer numbers;
            or the smaller model cannot be built, or computes something else than the layers did in the source.
    """
    kept = _kept_layers(structure, removed)
    config = _pruned_config(model_dir, structure, kept)
    check_function(model_dir, structure, config, kept)
    with complete_directory(target) as directory:
        copy_companions(model_dir, directory)
        write_json(directory / "config.json", config)
        _write_kept(directory, read_stored_model(model_dir), structure, kept)
        judged = sample_logits(StreamedModel.open(model_dir, structure), kept=kept)
        check_opens(directory, judged, replace(structure, layers=len(kept)))


def _kept_layers(structure: ModelStructure, removed: Collection[int]) -> list[int]:
    unknown = sorted(set(removed) - set(range(structure.layers)))
    if unknown:
        raise InputError(f"there is no layer {unknown[0]} to remove; the model has layers 0 to {structure.layers - 1}")
    kept = [layer for layer in range(structure.layers) if layer not in removed]
    if not kept or len(kept) == structure.layers:
        raise InputError(
            f"{len(set(removed))} of {structure.layers} layers cannot be removed; give at least one and keep one"
        )
    return kept


def _write_kept(directory: Path, stored: StoredModel, structure: ModelStructure, kept: Sequence[int]) -> None:
    """Write the tensors that remain, with the source's division into shards.

    Blocks are renumbered, under the names that their tensors have in the model; all else keeps its stored name.
    """
    shards: dict[Path, dict[str, str]] = {}
    for name, owner in _kept_tensors(stored, structure, kept).items():
        shards.setdefault(_file_of(stored, owner), {})[name] = owner
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total_bytes = 0
    for file, (_, owners) in zip(files, sorted(shards.items()), strict=True):
        values = stored.read(set(owners.values()))
        tensors = {name: values[owner] for name, owner in owners.items()}
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            name: file for file, (_, owners) in zip(files, sorted(shards.items()), strict=True) for name in owners
        }
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _kept_tensors(stored: StoredModel, structure: ModelStructure, kept: Sequence[int]) -> dict[str, str]:
    """Name in the pruned checkpoint → name in the source's model."""
    number = {str(layer): str(place) for place, layer in enumerate(kept)}
    prefix = f"{structure.layers_path}."
    names = {name: owner for name, owner in stored.owner.items() if not owner.startswith(prefix)}
    for owner in (*stored.tensors, *stored.conversions):
        layer, _, rest = owner.removeprefix(prefix).partition(".")
        if owner.startswith(prefix) and layer in number:
            names[f"{prefix}{number[layer]}.{rest}"] = owner
    return names


def _file_of(stored: StoredModel, owner: str) -> Path:
    return stored.tensors[owner].file if owner in stored.tensors else stored.conversions[owner].sources[0][0].file


def _pruned_config(model_dir: Path, structure: ModelStructure, kept: Sequence[int]) -> dict[str, Any]:
    """The source's config.json for the layers `kept`.

    Lists with one entry per layer come from the configuration as transformers completes it: some (`layer_types`)
    are derived from the layer's number when they are not written, which the renumbering would change.
    """
    config = read_model_config(model_dir)
    text_config = config.get_text_config()
    content = json.loads((model_dir / "config.json").read_text("utf-8"))
    section = next((name for name, value in vars(config).items() if value is text_config), None)
    text_content = content if section is None else content.setdefault(section, {})
    count = text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if getattr(text_config, count, None) != structure.layers:
        raise UnsupportedModel(
            f"{model_dir}/config.json does not give {structure.layers} layers as {count}; "
            "lmq cannot write a configuration with fewer"
        )
    text_content[count] = len(kept)
    for name, value in text_config.to_dict().items():
        if not isinstance(value, list) or not value or name.endswith(_NOT_PER_LAYER):
            continue
        if len(value) == structure.layers:
            text_content[name] = [value[layer] for layer in kept]
        elif "layer" in name:
            raise UnsupportedModel(
                f"{model_dir}/config.json has {name} = {value}, which names layers otherwise than one by one; "
                "lmq cannot renumber them"
            )
    return content
