"""Constraints of a deployment: what an allocation must keep beside its budget.

A serving engine may hold q, k and v in one matrix, have kernels for a few configurations only, or spread the layers
over devices of different memory. Written with module kinds and patterns; `Constraints.compile` turns them into
rows and columns of the budget program (`lmq.allocation.program`).

Patterns are shell patterns over `LAYER.KIND`: `0.self_attn.*`, `*.mlp.down_proj`, `1[0-9].*`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lmq.allocation.budget import Budget
from lmq.allocation.program import Limit, ProgramConstraints, row_of_modules
from lmq.allocation.solver import Allocation
from lmq.errors import InputError, unknown_name
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo, without_number

ALIKE_PRESETS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate-up": ("gate_proj", "up_proj"),
}
"""Last names of kinds that engines fuse: those of one block's same submodule share a configuration."""

EXPERTS = "experts"
"""Preset by which the same matrix of all experts of a layer has one configuration, as engines that run them need it."""

_PRESETS = (*ALIKE_PRESETS, EXPERTS)


@dataclass(frozen=True, kw_only=True)
class DeviceLimit:
    """Bytes that the quantized modules of the layers `first_layer` to `last_layer` (included) may take together."""

    first_layer: int
    last_layer: int
    size_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer <= self.last_layer:
            raise InputError(
                f"layers {self.first_layer} to {self.last_layer} of a device limit are not a range; "
                "count from 0 and give the first layer first"
            )
        if self.size_bytes <= 0:
            raise InputError(f"a limit of {self.size_bytes} bytes for {self.layers} is not positive")

    @property
    def layers(self) -> str:
        """`layers 0 to 15`."""
        return f"layers {self.first_layer} to {self.last_layer}"

    def holds(self, module: ModuleId) -> bool:
        """Whether the module is in these layers."""
        return self.first_layer <= module.layer <= self.last_layer


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What an allocation must keep beside its budget; the default is nothing.

    alike: kinds that share one configuration in every layer: their names, or a preset (`ALIKE_PRESETS`, `EXPERTS`).
    fixed: the configuration of the modules that a pattern matches.
    floor: the least stored bits per weight of the modules that a pattern matches, as a configuration; of several
        floors of a module the highest holds.
    most_configurations: how many different configurations may be in use.
    device_limits: bytes of groups of layers, which may overlap.
    """

    alike: tuple[str | tuple[str, ...], ...] = ()
    fixed: Mapping[str, QuantSpec] = field(default_factory=dict)
    floor: Mapping[str, QuantSpec] = field(default_factory=dict)
    most_configurations: int | None = None
    device_limits: tuple[DeviceLimit, ...] = ()

    def __post_init__(self) -> None:
        for kinds in self.alike:
            if isinstance(kinds, str) and kinds not in _PRESETS:
                raise unknown_name("preset of alike kinds", kinds, _PRESETS)
            if len(kinds) < 2:
                raise InputError(f"alike = {list(kinds)} names fewer than two kinds; name those that share")
        if self.most_configurations is not None and self.most_configurations < 1:
            raise InputError(f"most_configurations = {self.most_configurations} is not positive; give 1 or more")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to keep."""
        return self == Constraints()

    def compile(self, modules: Sequence[ModuleInfo], specs: Sequence[QuantSpec]) -> ProgramConstraints:
        """Rows and columns of the program for these modules and this menu.

        Raises InputError for a pattern, kind or layer that the model lacks, a configuration that the menu lacks, and
        constraints that contradict each other, naming the two.
        """
        ids = [module.id for module in modules]
        rules = _rules(self, ids, specs)
        groups = _alike_groups(self.alike, ids)
        _check_agreement(rules, row_of_modules(len(ids), groups), ids)
        _check_count(self.most_configurations, rules)
        allowed = np.ones((len(ids), len(specs)), bool)
        for rule in rules:
            allowed[list(rule.rows)] &= [rule.allows(spec) for spec in specs]
        return ProgramConstraints(
            allowed=allowed,
            groups=groups,
            most_configurations=self.most_configurations,
            limits=tuple(_limit(limit, ids) for limit in self.device_limits),
        )


def module_name(module: ModuleId) -> str:
    """What patterns are matched against: `0.self_attn.q_proj`."""
    return f"{module.layer}.{module.kind}"


def violations(allocation: Allocation, constraints: Constraints) -> list[str]:
    """What an allocation does not keep, one sentence each; empty where it keeps everything."""
    specs = allocation.specs
    broken = []
    for pattern, spec in constraints.fixed.items():
        broken += [
            f"{module} has {chosen}, fixed to {spec}" for module, chosen in _matching(specs, pattern) if chosen != spec
        ]
    for pattern, spec in constraints.floor.items():
        broken += [
            f"{module} has {chosen}, below the floor {spec}"
            for module, chosen in _matching(specs, pattern)
            if chosen.bits_per_weight < spec.bits_per_weight
        ]
    ids = list(specs)
    for group in _alike_groups(constraints.alike, ids):
        if len({specs[ids[row]] for row in group}) > 1:
            broken.append(f"{', '.join(f'{ids[row]} has {specs[ids[row]]}' for row in group)}, but must be alike")
    used, most = len(set(specs.values())), constraints.most_configurations
    if most is not None and used > most:
        broken.append(f"{used} different configurations are in use, at most {most} may be")
    for limit in constraints.device_limits:
        size_bytes = sum(item.size_bytes for item in allocation.assignments if limit.holds(item.module))
        if size_bytes > limit.size_bytes:
            broken.append(f"{limit.layers} take {size_bytes:,} bytes, at most {limit.size_bytes:,} may be")
    return broken


def parse_constraints(values: Mapping[str, Any]) -> Constraints:
    """Read constraints from plain values; a key that is absent or null constrains nothing.

        alike: [qkv, gate-up, experts, [self_attn.o_proj, mlp.down_proj]]
        fixed: {"0.*": b8g64}
        floor: {"*.mlp.down_proj": b4g64}
        most_configurations: 3
        device_limits: {"0-15": 1.5 GB, "16-31": 2 GB}

    Raises InputError for an unknown key, naming the nearest, and for a value of another form.
    """
    known = [item.name for item in fields(Constraints)]
    for key in values:
        if key not in known:
            raise unknown_name("constraint", str(key), known)
    most = values.get("most_configurations")
    if most is not None and type(most) is not int:
        raise InputError(f"most_configurations = {most!r} must be a whole number, such as 3")
    return Constraints(
        alike=_alike(values.get("alike")),
        fixed=_specs("fixed", values.get("fixed")),
        floor=_specs("floor", values.get("floor")),
        most_configurations=most,
        device_limits=tuple(
            _device_limit(str(layers), size)
            for layers, size in _mapping("device_limits", values.get("device_limits"), "{'0-15': '2 GB'}").items()
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """One pattern of `fixed` or `floor`, and the rows it matches."""

    is_fixed: bool
    pattern: str
    spec: QuantSpec
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'fixed' if self.is_fixed else 'floor'} {self.pattern!r}: {self.spec.name}"

    def allows(self, spec: QuantSpec) -> bool:
        return spec == self.spec if self.is_fixed else spec.bits_per_weight >= self.spec.bits_per_weight


def _matching(specs: Mapping[ModuleId, QuantSpec], pattern: str) -> list[tuple[ModuleId, QuantSpec]]:
    return [(module, spec) for module, spec in specs.items() if fnmatchcase(module_name(module), pattern)]


def _rules(constraints: Constraints, ids: Sequence[ModuleId], specs: Sequence[QuantSpec]) -> list[_Rule]:
    """The patterns with the rows they match, `fixed` first. Raises InputError for those that nothing can keep."""
    rules = [
        _Rule(is_fixed=is_fixed, pattern=pattern, spec=spec, rows=_rows(pattern, ids))
        for is_fixed, patterns in ((True, constraints.fixed), (False, constraints.floor))
        for pattern, spec in patterns.items()
    ]
    for rule in rules:
        if not any(rule.allows(spec) for spec in specs):
            lacks = "" if rule.is_fixed else " or anything above it"
            raise InputError(
                f"{rule}: the menu lacks {rule.spec.name}{lacks} (it holds {', '.join(spec.name for spec in specs)}); "
                "add it to the menu or choose another"
            )
    return rules


def _rows(pattern: str, ids: Sequence[ModuleId]) -> tuple[int, ...]:
    rows = tuple(row for row, module in enumerate(ids) if fnmatchcase(module_name(module), pattern))
    if rows:
        return rows
    kinds = [f"*.{kind}" for kind in dict.fromkeys(module.kind for module in ids)]
    near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.3) or kinds
    raise InputError(
        f"the pattern {pattern!r} matches none of the {len(ids)} modules, named LAYER.KIND as in "
        f"{module_name(ids[0])!r}; the nearest that do: {', '.join(map(repr, near))}"
    )


def _alike_groups(alike: Iterable[str | tuple[str, ...]], ids: Sequence[ModuleId]) -> tuple[tuple[int, ...], ...]:
    """Rows that must be alike. A preset ties what the model has of it; a kind that is named must be there."""
    groups: dict[tuple[int, int, str], list[int]] = {}
    known = {module.kind for module in ids}
    for number, kinds in enumerate(alike):
        if kinds == EXPERTS:
            for row, module in enumerate(ids):
                if (name := without_number(module.kind)) != module.kind:
                    groups.setdefault((number, module.layer, name), []).append(row)
            continue
        is_preset = isinstance(kinds, str)
        members = ALIKE_PRESETS[kinds] if isinstance(kinds, str) else kinds
        if not is_preset and (missing := [kind for kind in members if kind not in known]):
            raise unknown_name("kind of alike modules", missing[0], known)
        for row, module in enumerate(ids):
            parent, _, last = module.kind.rpartition(".")
            if (last if is_preset else module.kind) in members:
                groups.setdefault((number, module.layer, parent if is_preset else ""), []).append(row)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _check_agreement(rules: Sequence[_Rule], row_of: np.ndarray, ids: Sequence[ModuleId]) -> None:
    """Raise InputError naming two rules that one module, or modules that must be alike, cannot both keep."""
    fixed: dict[int, tuple[_Rule, int]] = {}
    for rule in rules:
        for row in rule.rows:
            group = int(row_of[row])
            if rule.is_fixed:
                fixed.setdefault(group, (rule, row))
            other, other_row = fixed.get(group, (rule, row))
            if not rule.allows(other.spec):
                where = str(ids[row]) if row == other_row else f"{ids[other_row]} and {ids[row]}, which must be alike"
                raise InputError(f"{other} and {rule} contradict each other on {where}; change one of them")


def _check_count(most: int | None, rules: Sequence[_Rule]) -> None:
    specs = {rule.spec: rule for rule in rules if rule.is_fixed}
    if most is not None and len(specs) > most:
        raise InputError(
            f"most_configurations = {most} contradicts {len(specs)} different fixed configurations "
            f"({'; '.join(map(str, specs.values()))}); allow at least {len(specs)} or fix fewer"
        )


def _limit(limit: DeviceLimit, ids: Sequence[ModuleId]) -> Limit:
    last = max(module.layer for module in ids)
    if limit.last_layer > last:
        raise InputError(f"{limit.layers} of a device limit are not all in the model, which has layers 0 to {last}")
    return Limit(
        name=f"the limit of {limit.layers}",
        rows=tuple(row for row, module in enumerate(ids) if limit.holds(module)),
        size_bytes=limit.size_bytes,
    )


def _alike(value: Any) -> tuple[str | tuple[str, ...], ...]:
    groups = [] if value is None else value
    texts = isinstance(groups, list | tuple) and all(
        isinstance(group, str) or (isinstance(group, list | tuple) and all(isinstance(kind, str) for kind in group))
        for group in groups
    )
    if not texts:
        raise InputError(f"alike = {value!r} must be a list of {', '.join(_PRESETS)} or lists of kinds")
    return tuple(group if isinstance(group, str) else tuple(group) for group in groups)


def _specs(name: str, value: Any) -> dict[str, QuantSpec]:
    patterns = _mapping(name, value, "{'*.mlp.down_proj': 'b4g64'}")
    return {str(pattern): QuantSpec.parse(str(spec)) for pattern, spec in patterns.items()}


def _mapping(name: str, value: Any, example: str) -> Mapping[Any, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{name} = {value!r} must be a mapping, such as {example}")
    return value or {}


def _device_limit(layers: str, size: Any) -> DeviceLimit:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", layers.strip())
    if match is None:
        raise InputError(f"{layers!r} are not layers of a device limit; write the first and the last as in '0-15'")
    size_bytes = Budget.parse(str(size)).size_bytes
    if size_bytes is None:
        raise InputError(f"device limit {size!r} of layers {layers} is not a number of bytes; write it as in '80 MB'")
    return DeviceLimit(first_layer=int(match[1]), last_layer=int(match[2] or match[1]), size_bytes=size_bytes)
