"""Overrides of a configuration from the command line: `--set a.b=value`."""

from __future__ import annotations

from typing import Any

import yaml

from lmq.errors import InputError


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key of `data` in place: `a.b=value`, entries of lists by number (`models.0.source=...`), YAML values.

    Raises InputError for another form, a number outside of the list, and a value that is not YAML.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override!r} is not of the form a.b=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: {value!r} is not a YAML value; close its brackets and quotes") from error
    target: Any = data
    *parents, last = key.split(".")
    for name in parents:
        target = target[_index(target, name, override)] if isinstance(target, list) else target.setdefault(name, {})
        if not isinstance(target, dict | list):
            raise InputError(f"--set {override!r}: {name!r} is a value, not a section")
    target[_index(target, last, override) if isinstance(target, list) else last] = parsed


def _index(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        allowed = f"0 to {len(items) - 1}" if items else "none, the list is empty"
        raise InputError(f"--set {override!r}: {name!r} is not an entry of the list (allowed: {allowed})")
    return int(name)
