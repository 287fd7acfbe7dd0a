"""The picture and the table of docs/architecture.md against the imports of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
PACKAGES = {"lmq": "lmq", "lmq_storage": "storage", "lmq_tasks": "tasks", "lmq_flows": "flows"}
SPLIT = ("lmq", "lmq_flows")
"""Packages of which the picture shows every folder and file; the others are one box each."""

Arrows = set[tuple[str, str]]


def box(module: str) -> str | None:
    """The box of a module: `lmq/model`, `flows/run`, `lmq/tables`, `tasks`. None outside of the project.

    None as well for the packages `lmq` and `lmq_flows` themselves: whoever imports a part of them imports these.
    """
    package, *parts = module.split(".")
    if package not in PACKAGES or (package in SPLIT and not parts):
        return None
    return f"{PACKAGES[package]}/{parts[0]}" if package in SPLIT else PACKAGES[package]


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside of a function."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in SPLIT:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_module(node.module, alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_module(package: str, name: str) -> bool:
    """Whether a package has a file or folder of this name, not just a function."""
    place = ROOT / PACKAGES[package] / name
    return place.is_dir() or place.with_suffix(".py").is_file()


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Every import of one box by another. What everything imports, `lmq/errors`, is left out."""
    found = set()
    for package, folder in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            source = box(".".join((package, *(part for part in parts if part != "__init__"))))
            found |= {(source, box(module)) for module in imported(file)}
    return frozenset(
        (source, target)
        for source, target in found
        if source and target and source != target and target != "lmq/errors"
    )


def reachable(start: str, edges: Arrows) -> set[str]:
    """All boxes that arrows lead to from `start`."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        following = {target for source, target in edges if source == waiting[-1]} - seen
        waiting.pop()
        seen |= following
        waiting += following
    return seen


def without_detours(edges: Arrows) -> Arrows:
    """The arrows that no other way replaces: what the picture shows."""
    return {
        (source, target)
        for source, target in edges
        if not any(target in reachable(between, edges) for start, between in edges if start == source != between)
    }


def drawn() -> Arrows:
    """Arrows of the first Mermaid drawing, by the names of their boxes."""
    drawing = re.search(r"```mermaid\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert drawing is not None
    names = dict(re.findall(r"(\w+)\[\"?([\w/]+)\"?\]", drawing[1]))
    pairs = re.findall(r"^\s*(\w+) --> (\w+(?: & \w+)*)\s*$", drawing[1], re.MULTILINE)
    return {(names[source], names[target]) for source, targets in pairs for target in targets.split(" & ")}


def listed() -> dict[str, set[str]]:
    """What the table says that every box imports."""
    rows = re.findall(r"^\| `([\w/]+)` \| [^|]+ \| ([^|]*) \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    return {name: set(re.findall(r"`([\w/]+)`", targets)) for name, targets in rows}


def test_the_table_lists_every_import_between_folders() -> None:
    boxes = {name for pair in arrows() for name in pair} | {"lmq/errors"}
    expected = {name: {target for source, target in arrows() if source == name} for name in boxes}
    assert listed() == expected


def test_the_picture_shows_the_imports() -> None:
    assert drawn() == without_detours(set(arrows()))


def test_arrows_run_one_way() -> None:
    assert not [pair for pair in arrows() if pair[0] in reachable(pair[1], set(arrows()))]


def test_an_arrow_that_another_way_replaces_is_not_drawn() -> None:
    edges = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}
    assert without_detours(edges) == edges - {("a", "c")}
    assert reachable("a", edges) == {"b", "c", "d"}
