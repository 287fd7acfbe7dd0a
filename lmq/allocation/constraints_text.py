"""Reading constraints as they are written in a configuration file: plain lists, mappings, text and numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lmq.allocation.budget import Budget
from lmq.allocation.constraints import ALIKE_PRESETS, Constraints, DeviceLimit
from lmq.errors import InputError, unknown_name
from lmq.formats.spec import QuantSpec


def parse_constraints(values: Mapping[str, Any]) -> Constraints:
    """Read constraints from plain values; a key that is absent or null constrains nothing.

        alike: [qkv, gate-up, [self_attn.o_proj, mlp.down_proj]]
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


def _alike(value: Any) -> tuple[str | tuple[str, ...], ...]:
    groups = [] if value is None else value
    texts = isinstance(groups, list | tuple) and all(
        isinstance(group, str) or (isinstance(group, list | tuple) and all(isinstance(kind, str) for kind in group))
        for group in groups
    )
    if not texts:
        raise InputError(f"alike = {value!r} must be a list of {', '.join(ALIKE_PRESETS)} or lists of kinds")
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
        raise InputError(f"{layers!r} are no layers of a device limit; write the first and the last as in '0-15'")
    size_bytes = Budget.parse(str(size)).size_bytes
    if size_bytes is None:
        raise InputError(f"device limit {size!r} of layers {layers} is no number of bytes; write it as in '80 MB'")
    return DeviceLimit(first_layer=int(match[1]), last_layer=int(match[2] or match[1]), size_bytes=size_bytes)
