"""What a model directory holds, by the names of the model's own tensors: which files, which tensors, as transformers.

This is the one place that decides it. The files are those of `lmq.model.tensors.weight_files`. Names are mapped by
transformers' own functions: its renamings, its converters (several stored tensors joined into one, or one split), and
the prefix that checkpoints of base models leave out. Ties are resolved as `from_pretrained` resolves them: a tied
tensor that is stored with values of its own keeps them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmq.errors import InputError, UnsupportedModel
from lmq.model.experts import Slice, split_experts
from lmq.model.skeleton import build_skeleton
from lmq.model.tensors import StoredTensor, read_headers, read_tensors, size_bytes
from lmq.model.transformers_lock import TRANSFORMERS_LOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(eq=False)
class Conversion:
    """Tensors that transformers computes from stored ones. `sources` come with the pattern that they matched."""

    first_target: str
    targets: tuple[str, ...]
    converter: WeightConverter
    sources: list[tuple[StoredTensor, str]] = field(default_factory=list)

    @property
    def is_stacked(self) -> bool:
        """Whether it stacks stored matrices in one tensor, one or several for every expert."""
        return len(self.targets) == 1 and all("*" in pattern for _, pattern in self.sources)

    def read(self, model: PreTrainedModel, part: int | None = None) -> dict[str, Tensor]:
        """The computed tensors by the model's names, in the types of what is stored.

        Where matrices are stacked in one tensor, a matrix per expert, `part` is the number of the one that is read: the
        stack then holds it alone.
        """
        converter = copy.deepcopy(self.converter)
        by_pattern: dict[str, list[StoredTensor]] = {}
        for stored, pattern in self.sources:
            by_pattern.setdefault(pattern, []).append(stored)
        sources = [
            (stored, pattern)
            for pattern, tensors in by_pattern.items()
            for stored in (tensors if part is None else tensors[part : part + 1])
        ]
        values = read_tensors(stored for stored, _ in sources)
        for stored, pattern in sources:
            converter.add_tensor(self.first_target, stored.name, pattern, values[stored.name])  # type: ignore[arg-type]
        converted = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(eq=False, kw_only=True)
class StoredModel:
    """The tensors of a model directory.

    `headers` are all stored tensors by stored name; `owner` gives the model's name for each that the model uses.
    `tensors` are those stored as the model uses them, by the model's name: tied tensors share one. `conversions` are
    the others. `slices` are the matrices of experts, each part of a tensor that is in one of the two by the name that
    transformers' own model has for it. A buffer of the model that is in none is computed when the model is built.
    """

    model: PreTrainedModel
    headers: Mapping[str, StoredTensor]
    owner: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    conversions: Mapping[str, Conversion]
    slices: Mapping[str, Slice] = field(default_factory=dict)

    @property
    def surplus(self) -> dict[str, StoredTensor]:
        """Stored tensors that the model's class does not have, such as layers that predict further tokens."""
        return {name: tensor for name, tensor in self.headers.items() if name not in self.owner}

    def stored_names(self, names: Iterable[str]) -> set[str]:
        """Stored names of what the tensors come from; a tied one may be stored under several.

        Raises InputError where the names leave out experts that are stored in one tensor with others, and for tensors
        that are computed from several.
        """
        given = list(names)
        for name in given:
            if not self.holds(name) or name in self.conversions:
                raise InputError(f"{name} is not stored as it is used; is it the model of this structure?")
        fused = {self.slices[name].fused for name in given if name in self.slices}
        for name in sorted({name for name, part in self.slices.items() if part.fused in fused} - set(given)):
            raise InputError(
                f"{name} is left out where other experts of its layer are not; give every expert of a layer a "
                "configuration, or none"
            )
        wanted = {self.tensors[name] for name in given if name not in self.slices}
        wanted |= {source for name in fused for source in self._sources(name)}
        owners = {name for name, tensor in self.tensors.items() if tensor in wanted}
        return {tensor.name for tensor in wanted} | {name for name, owner in self.owner.items() if owner in owners}

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model comes from the files."""
        return name in self.tensors or name in self.conversions or name in self.slices

    def types(self, name: str) -> set[str]:
        """Types that a tensor is stored in, as safetensors writes them: one, but for what is joined from several."""
        return {source.dtype for source in self._sources(self._whole(name))}

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor is stored in; that of an expert its share."""
        total = sum(size_bytes(source) for source in self._sources(self._whole(name)))
        return total // self.slices[name].experts if name in self.slices else total

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names, in the types of what is stored; tied ones are one tensor."""
        wanted = list(names)
        parts = {(part.fused, part.number) for name in wanted if (part := self.slices.get(name))}
        if all(name in self.slices for name in wanted) and len({number for _, number in parts}) == 1:
            return self._read_expert(wanted)
        whole = list(dict.fromkeys(self._whole(name) for name in wanted))
        direct = {name: self.tensors[name] for name in whole if name in self.tensors}
        values = read_tensors(set(direct.values()))
        found = {name: values[stored.name] for name, stored in direct.items()}
        for conversion in {id(c): c for name in whole if (c := self.conversions.get(name))}.values():
            found |= conversion.read(self.model)
        return {
            name: self.slices[name].of(found[self._whole(name)]) if name in self.slices else found[name]
            for name in wanted
        }

    def _read_expert(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Matrices of one expert, of which the others' are not read where they are stored apart."""
        found: dict[str, Tensor] = {}
        for name in names:
            part = self.slices[name]
            conversion = self.conversions.get(part.fused)
            if conversion is None:  # one tensor, of whose pages those of the part are read
                found[name] = part.of(read_tensors([self.tensors[part.fused]])[self.tensors[part.fused].name])
            elif conversion.is_stacked:
                stack = conversion.read(self.model, part.number)[part.fused]
                found[name] = replace(part, number=0).of(stack)
            else:
                found[name] = part.of(conversion.read(self.model)[part.fused])
        return found

    def _whole(self, name: str) -> str:
        """What a tensor is part of."""
        return self.slices[name].fused if name in self.slices else name

    def _sources(self, name: str) -> list[StoredTensor]:
        if name in self.tensors:
            return [self.tensors[name]]
        return [source for source, _ in self.conversions[name].sources]


def read_stored_model(model_dir: Path) -> StoredModel:
    """What an unquantized model directory holds; reads headers, and values only of tied tensors that are stored twice.

    The matrices of experts are layers of their own (`lmq.model.experts`). Raises InputError for damaged files,
    UnsupportedModel for a model that is not one of transformers, is quantized, does not fit its configuration, or has
    experts of another layout.
    """
    stored = match_tensors(build_skeleton(model_dir), read_headers(model_dir))
    return replace(stored, slices=split_experts(stored.model))


def match_tensors(model: PreTrainedModel, headers: Mapping[str, StoredTensor]) -> StoredModel:
    """The stored tensor, or the conversion, of every tensor of the model.

    Raises UnsupportedModel naming tensors that are missing, or whose shape is not what the configuration says.
    """
    expected: dict[str, Tensor] = dict(model.state_dict())
    owner, conversions = _owners(model, headers, expected)
    tensors = {name: headers[stored] for stored, name in owner.items() if name not in conversions}
    for name, found in tensors.items():
        if found.shape != tuple(expected[name].shape):
            raise UnsupportedModel(
                f"{found.file} holds {found.name} of shape {list(found.shape)} where config.json means "
                f"{list(expected[name].shape)}; the checkpoint does not belong to its configuration"
            )
    _require_complete(conversions, expected)
    _tie(model, tensors)
    computed = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
    missing = [name for name in expected if name not in tensors and name not in conversions and name not in computed]
    if missing:
        raise UnsupportedModel(
            f"the checkpoint lacks {len(missing)} of the {len(expected)} tensors of {type(model).__name__}: "
            f"{_first_of(missing)}; it holds {_first_of(list(headers))}"
        )
    return StoredModel(model=model, headers=headers, owner=owner, tensors=tensors, conversions=conversions)


def _owners(
    model: PreTrainedModel, headers: Mapping[str, StoredTensor], expected: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, Conversion]]:
    """The model's name of each stored tensor that it uses, and the conversions by the model's names.

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`: where two stored tensors come to
    the same name, the first in natural order counts, and a name that the model has is not renamed in vain.
    """
    with TRANSFORMERS_LOCK:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    owner: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    taken: set[str] = set()
    for stored in sorted(headers, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name not in expected or (name in taken and pattern is None):
            continue
        owner[stored] = name
        taken.add(name)
        if pattern is not None:
            converter = converter_of[pattern]
            if name not in conversions:
                targets = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
                made = Conversion(name, tuple(targets), converter)
                conversions |= dict.fromkeys(targets, made)
            conversions[name].sources.append((headers[stored], pattern))
    return owner, conversions


def _require_complete(conversions: Mapping[str, Conversion], expected: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModel where one of the matrices that are stacked in one tensor, a matrix per expert, is missing
    or of another shape than the configuration says."""
    for name, conversion in conversions.items():
        stacked = Counter(pattern for _, pattern in conversion.sources if "*" in pattern)
        if not stacked or len(conversion.targets) > 1:
            continue
        count, shape = len(expected[name]), list(expected[name].shape)
        for pattern in conversion.converter.source_patterns:
            if stacked[pattern] != count:
                raise UnsupportedModel(
                    f"{name} needs {count} matrices {pattern} where the checkpoint holds {stacked[pattern]}; "
                    "download it again"
                )
        elements = sum(source.elements for source, _ in conversion.sources)
        if elements != expected[name].numel():
            first = conversion.sources[0][0]
            raise UnsupportedModel(
                f"{name} of shape {shape} is joined from {len(conversion.sources)} matrices such as {first.name} "
                f"{list(first.shape)}, {elements:,} weights where {expected[name].numel():,} are expected; "
                "the checkpoint does not belong to its configuration"
            )


def _tie(model: PreTrainedModel, tensors: dict[str, StoredTensor]) -> None:
    """Give tied tensors the one that is stored; those that are stored apart with other values stay apart."""
    tied: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, [source]).append(name)
    for names in tied.values():
        there = [name for name in names if name in tensors]
        for name in names:
            if there and (name not in tensors or _same_values(tensors[name], tensors[there[0]])):
                tensors[name] = tensors[there[0]]


def _first_of(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    if first == second:
        return True
    values, others = (read_tensors([tensor])[tensor.name] for tensor in (first, second))
    return torch.equal(values, others) if values.dtype == others.dtype else torch.equal(values.float(), others.float())
