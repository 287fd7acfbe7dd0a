"""What is wrong with a run configuration, in words: the key, its value, what is allowed, the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_RULES = {
    "tuple_type": "must be a list",
    "string_type": "must be text; quote it where YAML reads it as something else",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "may hold letters, digits, '.', '_' and '-', and begins with a letter or digit",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "greater_than_equal": "must be at least {ge}",
    "too_short": "must have at least one entry",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys of its own",
    "dict_type": "must be a section with keys of its own",
}
"""What a value must be, by pydantic's name of the problem."""


def problem_texts(error: ValidationError, sections: Mapping[str, type[BaseModel]]) -> list[str]:
    """Every problem in words; a list is not called short because its entries are wrong.

    `sections` are the known sections by their first key, the whole file under "".
    """
    found = error.errors()
    places = [item["loc"] for item in found]
    return [
        _problem_text(item, sections)
        for item in found
        if item["type"] != "too_short" or not any(_is_inside(place, item["loc"]) for place in places)
    ]


def _is_inside(place: Sequence[str | int], section: Sequence[str | int]) -> bool:
    return len(place) > len(section) and place[: len(section)] == section


def _problem_text(item: Any, sections: Mapping[str, type[BaseModel]]) -> str:
    """One problem in words, with the nearest known key for a misspelt one."""
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = sections[str(item["loc"][0]) if len(item["loc"]) > 1 else ""]
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {place!r}{hint} (allowed: {', '.join(known)})"
    if item["type"] == "missing":
        return f"key {place!r} is missing"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    rule = _RULES[item["type"]].format(**item.get("ctx", {})) if item["type"] in _RULES else item["msg"]
    return f"{place} = {_short(item['input'])}: {rule}"


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."
