"""Every path and module that a document, a docstring or a comment names exists."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"lmq": "lmq", "lmq_storage": "storage", "lmq_tasks": "tasks", "lmq_flows": "flows"}
ELSEWHERE = {"lmq_flows.presets": "deployments/presets", "lmq_flows.deployments": "deployments"}
LABELS = {"lmq.schema", "lmq.grids", "lmq.moments", "lmq.process", "lmq.host", "lmq.alive"}
"""Keys in files and labels of runs, which look like modules."""
FOLDERS = ("lmq", "storage", "tasks", "flows", "tests", "docs", "benchmarks", "deployments")
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "CHANGELOG.md",
    ]
)
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

PATH = re.compile(
    rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*(?:\.(?:py|md|yaml|yml|json|css|js)\b|/(?![\w.*{{<-]))"
)
DOTTED = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+(?!\w|\.(?:py|md|yaml|json|toml)\b)")


def missing(text: str) -> list[str]:
    """What `text` names that does not exist."""
    paths = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    return paths + [name for name in DOTTED.findall(text) if name not in LABELS and not exists(name)]


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines or imports."""
    if dotted in ELSEWHERE:
        return (ROOT / ELSEWHERE[dotted]).is_dir()
    package, *parts = dotted.split(".")
    place = ROOT / PACKAGES[package]
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        file = place / f"{parts.pop(0)}.py"
    else:
        file = place / "__init__.py"
    return not parts or parts[0] in names(file)


@cache
def names(file: Path) -> frozenset[str]:
    """What a module binds at its top, and the attributes of every module."""
    bound = {"__name__", "__path__", "__file__", "__version__"}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))) if file.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    return frozenset(bound)


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the comments, docstrings and messages of a file; of tests, comments and docstrings only."""
    with file.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    tree = ast.parse(file.read_text("utf-8"))
    nodes: Iterator[ast.AST] = ast.walk(tree)
    if file.is_relative_to(ROOT / "tests"):  # whose other texts may hold code for modules that are made up
        nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_name_what_exists(document: Path) -> None:
    assert missing(document.read_text("utf-8")) == []


def test_docstrings_and_comments_name_what_exists() -> None:
    gone = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in SOURCES
        if file != Path(__file__)
        for line, text in prose(file)
        for name in missing(text)
    ]
    assert gone == []


def test_what_is_gone_is_found() -> None:
    assert missing("see `lmq/sensitivity.py`, docs/benchmarks.md and lmq/model/") == ["lmq/sensitivity.py"]
    assert missing("all of lmq/signals/ and of tests/lmq/") == ["lmq/signals/"]
    assert missing("`lmq.formats.spec.QuantSpec`, `lmq.capture`, lmq_tasks.patience.") == [
        "lmq.capture",
        "lmq_tasks.patience",
    ]
    assert missing("lmq.formats.spec.Nothing and lmq.load(path)") == ["lmq.formats.spec.Nothing"]
