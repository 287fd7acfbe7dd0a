"""Whether layers compute the same when others are left out and they take new places.

Some models compute with the number of a layer or with the depth of the model: MiniCPM divides by the square root of the
number of layers, DiffLlama's λ grows with the layer's number, windows may alternate by number. Where the configuration
lists such things layer by layer, the lists are cut with the layers; where they are in the code, a pruned model would be
another than the one that was judged.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmq.errors import UnsupportedModel
from lmq.model.directory import write_json
from lmq.model.skeleton import read_model_config, skeleton_of
from lmq.model.stored import read_stored_model
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure

_TOKENS = 12
_TOLERANCE = 1e-5
"""Relative difference of states: the same code on the same numbers."""

_NUMBER = re.compile(r"(^|_)(idx|index|id|number|num)$|layer_?(idx|id|index|number|num)|^(idx|index)")


@torch.no_grad()
def check_function(model_dir: Path, structure: ModelStructure, config: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Raise UnsupportedModel unless the layers `kept` compute the same in a model of the configuration `config`.

    `config` is the content of a config.json for `len(kept)` layers. Every layer runs in both models on the same weights
    and states, one at a time; so do the embedding and the head.
    """
    stored = read_stored_model(model_dir)
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory) / "config.json", config)
        model = skeleton_of(read_model_config(Path(directory)), f"{model_dir} with {len(kept)} layers")
    cpu = torch.device("cpu")
    whole = StreamedModel(stored, structure, cpu, torch.float32)
    shallow = StreamedModel(replace(stored, model=model), replace(structure, layers=len(kept)), cpu, torch.float32)
    tokens = torch.arange(1, _TOKENS + 1)[None] % structure.vocabulary_size
    hidden = whole.embed(tokens)
    _require_same(shallow.embed(tokens), hidden, structure, "the embedding")
    inputs, new_inputs = whole.block_inputs(_TOKENS), shallow.block_inputs(_TOKENS)
    for place, layer in enumerate(kept):
        twin = shallow.bare_block(place)
        _require_same_constants(whole.bare_block(layer), twin, structure, (layer, place))
        with whole.block(layer) as block:
            twin.load_state_dict(block.state_dict(), assign=True)
            new_states = new_inputs[place].run(twin, hidden.clone())  # a block may change its inputs in place
            hidden = inputs[layer].run(block, hidden)
        _require_same(new_states, hidden, structure, f"layer {layer}")
    _require_same(shallow.head_logits(hidden), whole.head_logits(hidden), structure, "the head")


def _require_same(found: Tensor, expected: Tensor, structure: ModelStructure, what: str) -> None:
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= _TOLERANCE:
        raise UnsupportedModel(
            f"{structure.architecture} cannot be pruned: {what} computes something else in a model of fewer layers "
            f"(its states differ by {difference:.2g}), as it depends on the number of layers or on the layer's own "
            "number, which config.json cannot say otherwise"
        )


def _require_same_constants(
    block: nn.Module, twin: nn.Module, structure: ModelStructure, places: tuple[int, int]
) -> None:
    """Compare the modules of a block, and what they were made with: what shows only in long texts, as a window."""
    for of in (_classes, _constants):
        expected, found = of(block), of(twin)
        for name in dict.fromkeys([*expected, *found]):
            values = (expected.get(name), found.get(name))
            if values[0] != values[1] and values != places:
                raise UnsupportedModel(
                    f"{structure.architecture} cannot be pruned: {name or 'all'} of layer {places[0]} would be "
                    f"{values[1]} instead of {values[0]} in its new place {places[1]}, as it follows from the layer's "
                    "number or the number of layers, which config.json cannot say otherwise"
                )


def _classes(block: nn.Module) -> dict[str, str]:
    """The classes of a block's modules: in a hybrid, layers differ in them."""
    return {path: type(module).__name__ for path, module in block.named_modules()}


def _constants(block: nn.Module) -> dict[str, Any]:
    """The numbers, switches and words that a block's modules hold, without those that are the layer's number."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and not _NUMBER.search(name)
    }
