"""Guard of the algorithm versions: which code a stage's results come from, and whether it changed.

`algorithm_versions.json` holds, per stage, its version and a digest of the source it uses: the stage's body,
the helpers beside it, and every library module these import, directly or not (comments, docstrings and layout
do not count). A test compares it with the code. After a change of code:

    python -m lmq_tasks.versions                      # when the version of every changed stage was raised
    python -m lmq_tasks.versions --same-results NAME  # when the change cannot alter what stage NAME makes
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lmq_tasks.stage import Stage

LOCK_FILE = Path(__file__).parent / "algorithm_versions.json"


def source_digest(stage: Stage) -> str:
    """Digest of the normalised source that the stage's results come from."""
    tree = ast.parse(inspect.getsource(sys.modules[stage.body.__module__]))
    own, imported = _reachable(tree, stage.body.__name__)
    modules = set().union(*(_closure(name) for name in imported)) if imported else set()
    parts = [*own, *(f"{name}:{_normalised(_parse(name))}" for name in sorted(modules))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def changed_stages(stages: dict[str, Stage]) -> dict[str, str]:
    """Stages whose code or version is not what the lock file says, with what to do."""
    lock = json.loads(LOCK_FILE.read_text())
    problems = {}
    for name, stage in stages.items():
        known = lock.get(name)
        if known is None:
            problems[name] = "is not in algorithm_versions.json; run python -m lmq_tasks.versions"
        elif known["version"] != stage.version:
            problems[name] = (
                f"went from version {known['version']} to {stage.version}; run python -m lmq_tasks.versions"
            )
        elif known["digest"] != source_digest(stage):
            problems[name] = (
                "uses code that changed: raise its version if results may differ, "
                f"else run python -m lmq_tasks.versions --same-results {name}"
            )
    return problems


def _reachable(tree: ast.Module, start: str) -> tuple[list[str], set[str]]:
    """Normalised functions and classes of the module that `start` uses, and library modules they name."""
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    sources = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module
    }
    seen: set[str] = set()
    imported: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in defined:
            waiting += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
        elif sources.get(name, "").startswith("lmq."):
            imported.add(sources[name])
    return [_normalised(defined[name]) for name in sorted(seen & defined.keys())], imported


@cache
def _closure(module: str) -> frozenset[str]:
    """The library module and every library module it imports, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _library_imports(_parse(name))
    return frozenset(found)


def _library_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lmq."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lmq."))


@cache
def _parse(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no source for {module}"
    assert spec.origin is not None, f"no source for {module}"
    return ast.parse(Path(spec.origin).read_text())


def _normalised(tree: ast.AST) -> str:
    """The tree as text without docstrings, positions and comments."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree, annotate_fields=False)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def main() -> int:
    """Write the lock file; refuse a stage whose code changed without a new version or the mark."""
    from lmq_tasks import STAGES

    parser = argparse.ArgumentParser(prog="lmq_tasks.versions", description="Record the algorithm versions.")
    parser.add_argument("--same-results", action="append", default=[], metavar="STAGE", choices=[*STAGES, "all"])
    marked = parser.parse_args().same_results
    known = json.loads(LOCK_FILE.read_text()) if LOCK_FILE.exists() else {}
    refused = [
        name
        for name, stage in STAGES.items()
        if name in known
        and known[name]["version"] == stage.version
        and known[name]["digest"] != source_digest(stage)
        and not {name, "all"} & set(marked)
    ]
    if refused:
        sys.stderr.write(f"changed without a new version: {', '.join(refused)}\n")
        return 1
    lock = {name: {"version": stage.version, "digest": source_digest(stage)} for name, stage in STAGES.items()}
    LOCK_FILE.write_text(json.dumps(lock, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
