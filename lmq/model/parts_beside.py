"""What lies beside a language model: towers for images and projectors, kept, or quantized where a pattern names them.

A pattern names a matrix by its path, `model.vision_tower.*.mlp.*`, or from the name of its part on, `vision_tower.*`.
Patterns over LAYER.KIND, such as `*` and `*.mlp.*`, name the language model's modules alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from lmq.errors import InputError
from lmq.model.auto_class import loss_of
from lmq.model.stored import StoredModel
from lmq.model.structure import KeptPart, ModuleId, Tower
from lmq.model.tensors import size_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def places_beside(stored: StoredModel, layers_path: str) -> list[str]:
    """Paths of what lies beside the language model of a model whose configuration has one for the text alone.

    The language model is the innermost module that holds the blocks and the table of token embeddings; its head may lie
    outside.
    """
    model = stored.model
    if not loss_of(model.config).per_token or model.config.get_text_config() is model.config:
        return []
    place = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    while place and not layers_path.startswith(f"{place}."):
        place = place.rpartition(".")[0]
    found = []
    while place:
        place, _, within = place.rpartition(".")
        for name, module in model.get_submodule(place).named_children():
            path = f"{place}.{name}".removeprefix(".")
            is_beside = name != within and module is not model.get_output_embeddings()
            if is_beside and next(module.parameters(), None) is not None:
                found.append(path)
    return found


def kept_parts(stored: StoredModel, places: Sequence[str], replaced: Collection[str]) -> Iterator[KeptPart]:
    """What of the parts at these places is in tensors that are not `replaced` by quantized ones."""
    for path in places:
        names = [name for name, owner in stored.owner.items() if owner.startswith(f"{path}.") and name not in replaced]
        if names:
            tensors = [stored.headers[name] for name in names]
            yield KeptPart(path, sum(tensor.elements for tensor in tensors), sum(map(size_bytes, tensors)))


def towers_beside(model: PreTrainedModel, places: Sequence[str], patterns: Sequence[str]) -> Iterator[Tower]:
    """A tower for each part beside the language model of which a pattern names a matrix.

    It is the largest list of blocks in the part, or the part as one block; what lies around it stays as it is. Raises
    InputError for a pattern that names a part but no matrix of its blocks.
    """
    for part in places:
        own = [pattern for pattern in patterns if is_part_of(pattern, part)]
        matrices = _matrices(model, part) if own else []
        for pattern in own:
            if not any(_is_named(pattern, part, path) for path in matrices):
                shown = ", ".join(matrices[:8]) or "no nn.Linear"
                raise InputError(f"modules: {pattern!r} matches no matrix in the blocks of {part}, which hold {shown}")
        if own:
            layers_path = largest_list(model, part) or part
            blocks, first, last = map(model.get_submodule, (layers_path, matrices[0], matrices[-1]))
            is_block = layers_path == part
            # a projector ends with the states that it makes; a block begins with those that enter it
            width: Any = last.out_features if is_block else first.in_features
            yield Tower(layers_path, 1 if is_block else len(list(blocks.children())), width, part=part)


def _matrices(model: PreTrainedModel, part: str) -> list[str]:
    """Paths of the nn.Linear modules in the blocks of a part beside the language model."""
    return _linear(model, largest_list(model, part) or part)


def _linear(model: PreTrainedModel, place: str) -> list[str]:
    found = model.get_submodule(place).named_modules(prefix=place)
    return [path for path, module in found if isinstance(module, nn.Linear)]


def left_beside(model: PreTrainedModel, towers: Sequence[Tower], patterns: Sequence[str]) -> Iterator[ModuleId]:
    """The matrices of towers beside the language model that no pattern names.

    Raises InputError for a block that would have no matrix left.
    """
    layer = 0
    for tower in towers:
        for number in range(tower.layers):
            path = tower.block_path(number)
            if tower.part is not None:
                linear = _linear(model, path)
                left = [name for name in linear if not any(_is_named(each, tower.part, name) for each in patterns)]
                if len(left) == len(linear):
                    raise InputError(
                        f"modules: {', '.join(patterns)} leave {path} without a matrix; take one of each block of "
                        f"{tower.part}, or none"
                    )
                yield from (ModuleId(layer, name.removeprefix(f"{path}.")) for name in left)
            layer += 1


def largest_list(model: PreTrainedModel, place: str) -> str | None:
    """Path of the list of modules with the most parameters under `place`; None where there is none."""
    paths = {id(module): path for path, module in model.named_modules()}
    sizes = {
        paths[id(module)]: sum(parameter.numel() for parameter in module.parameters())
        for module in model.get_submodule(place).modules()
        if isinstance(module, nn.ModuleList)
    }
    return max(sizes, key=lambda path: sizes[path]) if any(sizes.values()) else None


def is_part_of(pattern: str, path: str) -> bool:
    """Whether a pattern names a part of a model or what is in it: `vision_tower.*` of `model.vision_tower`."""
    first = pattern.strip("*.")
    return any(first == name or first.startswith(f"{name}.") for name in (path, path.rpartition(".")[2]))


def _is_named(pattern: str, part: str, path: str) -> bool:
    """Whether a pattern names the matrix at a path in a part, by its path, from the part on, or with all of it."""
    if not is_part_of(pattern, part):
        return False
    name = part.rpartition(".")[2]
    return pattern.strip("*.") in (part, name) or any(
        fnmatchcase(each, pattern) for each in (path, f"{name}{path.removeprefix(part)}")
    )
