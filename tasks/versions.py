"""Guard of the algorithm versions: which code a stage's results come from, and whether it changed.

`algorithm_versions.json` holds, per stage, its version and a digest of the source it uses: the stage's body,
the helpers it uses in any file of `lmq_tasks`, and every library module these import, directly or not (comments,
docstrings and layout do not count). A test compares it with the code. After a change of code:

    python -m lmq_tasks.versions                      # when the version of every changed stage was raised
    python -m lmq_tasks.versions --same-results NAME  # when the change cannot alter what stage NAME makes
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lmq_tasks.stage import Stage

LOCK_FILE = Path(__file__).parent / "algorithm_versions.json"

_FRAME = "lmq_tasks.stage"


def source_digest(stage: Stage) -> str:
    """Digest of the normalised source that the stage's results come from."""
    parts: list[str] = []
    modules: set[str] = set()
    for function in stage.made_by or (stage.body,):
        if _is_library(function.__module__):
            modules |= _closure(function.__module__)
            continue
        used, library = _stage_sources(function.__module__, function.__name__)
        parts += used
        modules = modules.union(*(_closure(name) for name in library))
    parts += [_module_digest(name) for name in sorted(modules)]
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


def _stage_sources(module: str, start: str) -> tuple[list[str], set[str]]:
    """Normalised definitions that `start` uses, in its module and in others of `lmq_tasks`, and the library modules.

    What carries a stage (`lmq_tasks.stage`) is left out: it hands the body its inputs and computes nothing.
    """
    seen: set[tuple[str, str]] = set()
    definitions: dict[tuple[str, str], str] = {}
    library: set[str] = set()
    waiting = [(module, start)]
    while waiting:
        place = waiting.pop()
        if place in seen or place[0] == _FRAME:
            continue
        seen.add(place)
        defined, imports = _names(place[0])
        used: list[tuple[str, str]] = []
        if place[1] in defined:
            node = defined[place[1]]
            definitions[place] = _normalised(node)
            waiting += [(place[0], each.id) for each in ast.walk(node) if isinstance(each, ast.Name)]
            used = [where for each in ast.walk(node) for _, where in _imported(each)]
        elif place[1] in imports:
            used = [imports[place[1]]]
        waiting += [where for where in used if where[0].startswith("lmq_tasks.")]
        library |= {where[0] for where in used if _is_library(where[0])}
    return [definitions[place] for place in sorted(definitions)], library


def _names(module: str) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """What a module defines at its top, by name, and where the names that it imports there come from."""
    defined: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in _parse(module).body:
        imports |= dict(_imported(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined[node.target.id] = node
    return defined, imports


def _imported(node: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """The names that an import statement binds, each with its module and its name there ("" for a whole module)."""
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            where = (inside, "") if _is_module(inside) else (node.module, alias.name)
            yield alias.asname or alias.name, where
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], (alias.name, "")


@cache
def _closure(module: str) -> frozenset[str]:
    """The library module and every library module it imports, directly or not."""
    modules: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules.add(name)
            waiting += _imported_library(name)
    return frozenset(modules)


@cache
def _imported_library(module: str) -> tuple[str, ...]:
    """Library modules that one module imports or names."""
    return tuple({place for node in ast.walk(_parse(module)) for place in _library_modules(node)})


def _library_modules(node: ast.AST) -> Iterator[str]:
    """Library modules that a statement imports, or that a text names, to be imported later."""
    yield from (place for _, (place, _) in _imported(node) if _is_library(place))
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_module(node.value):
        yield node.value


def _is_library(module: str) -> bool:
    return module == "lmq" or module.startswith("lmq.")


@cache
def _is_module(name: str) -> bool:
    """Whether a dotted name below one of our packages is a module."""
    if not name.startswith(("lmq.", "lmq_tasks.")):
        return False
    parent, _, last = name.rpartition(".")
    spec = importlib.util.find_spec(parent)
    places = (spec.submodule_search_locations if spec else None) or []
    return any((Path(place) / f"{last}.py").exists() or (Path(place) / last).is_dir() for place in places)


@cache
def _parse(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no source for {module}"
    assert spec.origin is not None, f"no source for {module}"
    return ast.parse(Path(spec.origin).read_text())


@cache
def _module_digest(name: str) -> str:
    return f"{name}:{hashlib.sha256(_normalised(_parse(name)).encode()).hexdigest()}"


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
