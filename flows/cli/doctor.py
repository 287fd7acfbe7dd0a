"""`lmq doctor`: will it work on this machine, and if not, what to do."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.table import Table

from lmq.errors import InputError
from lmq_flows.cli.arguments import add_places
from lmq_flows.cli.terminal import console, say

_PYTHON = (3, 11)
_PATIENCE_S = 3.0
_LITTLE_DISK_BYTES = 5e9
_HUB = "https://huggingface.co"
_STYLES = {"ok": "green", "note": "yellow", "breaks": "red"}
_EXTRAS = {
    "lora": "LoRA on top of packed layers",
    "tasks": "zero-shot tasks of lm-eval",
    "vllm": "exports for vLLM, and reading them",
    "llama": "llama.cpp itself, to compare GGUF files with in tests and benchmarks",
    "dask": "runs on workers of Dask",
    "ray": "runs on workers of Ray",
    "s3": "a store on S3",
}
"""What the optional dependencies are for."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: `breaks` where something will not work, `note` where it may matter.

    `todo` says what to do about it; None where nothing has to be done.
    """

    what: str
    level: Literal["ok", "note", "breaks"]
    found: str
    todo: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq doctor`."""
    add_places(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.set_defaults(command=doctor_command)


def doctor_command(arguments: argparse.Namespace) -> int:
    """Look at versions, hardware, disks, server and hub; 1 where something will break."""
    findings = list(examine(arguments.store, arguments.runs))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(finding.level == "breaks" for finding in findings) else 0


def examine(store: str, runs: str) -> Iterator[Finding]:
    """Everything that is looked at. `store` is a directory or URL, `runs` a directory."""
    yield _python()
    yield from _packages()
    yield from _extras()
    yield _processors()
    yield _gpu()
    yield from (_place("store", store), _place("runs", runs))
    yield _server()
    yield _hub()


def _print(findings: list[Finding]) -> None:
    table = Table("", "", "Found", "To do")
    for finding in findings:
        style = _STYLES[finding.level]
        table.add_row(f"[{style}]{finding.level}[/{style}]", finding.what, finding.found, finding.todo or "")
    console.print(table)
    broken = [finding.what for finding in findings if finding.level == "breaks"]
    say(f"will break: {', '.join(broken)}" if broken else "nothing here will break")


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        return Finding(what="Python", level="breaks", found=found, todo="use Python 3.11 or newer")
    return Finding(what="Python", level="ok", found=found)


def _packages() -> Iterator[Finding]:
    """Every package that lmq needs whose version is missing or outside of what was tried, else that all are there."""
    needed = _requirements(None)
    amiss = [(str(requirement), found) for requirement, found in needed if not _fits(requirement, found)]
    for wanted, found in amiss:
        name = wanted.split(";")[0]
        yield Finding(
            what=f"package {name}", level="breaks", found=found or "not installed", todo=f"pip install '{name}'"
        )
    if not amiss:
        shown = ", ".join(f"{name} {version(name)}" for name in ("prefect", "fastapi", "sqlalchemy", "torch"))
        yield Finding(what="packages", level="ok", found=f"{len(needed)} of {len(needed)} fit; {shown}")


def _extras() -> Iterator[Finding]:
    """The optional dependencies that are not there, or not in a version that fits."""
    for extra, use in _EXTRAS.items():
        missing = [requirement.name for requirement, found in _requirements(extra) if not _fits(requirement, found)]
        if missing:
            yield Finding(
                what=f"optional: {use}",
                level="note",
                found=f"without {', '.join(missing)}",
                todo=f"if wanted: pip install 'lmq[{extra}]'",
            )


def _requirements(extra: str | None) -> list[tuple[Requirement, str | None]]:
    """What lmq needs (of an extra, or always) with the version that is installed."""
    needed = [Requirement(text) for text in requires("lmq") or ()]
    always = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    if extra is not None:
        needed = [each for each in needed if each.marker is not None and each.marker.evaluate({"extra": extra})]
    chosen = always if extra is None else [each for each in needed if each not in always]
    return [(each, _installed(each.name)) for each in chosen]


def _installed(name: str) -> str | None:
    """Version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(requirement: Requirement, found: str | None) -> bool:
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _processors() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} cores, torch works with {torch.get_num_threads()} threads"
    if torch.get_num_threads() < cores and os.environ.get("OMP_NUM_THREADS"):
        todo = "runs set their own threads (runner.threads_per_worker); for lmq evaluate unset OMP_NUM_THREADS"
        return Finding(what="processors", level="note", found=found, todo=todo)
    return Finding(what="processors", level="ok", found=found)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{device.name} ({device.total_memory / 1e9:.0f} GB)" for device in devices)
        return Finding(what="GPU", level="ok", found=found)
    if shutil.which("nvidia-smi"):
        found = f"there is one that torch {torch.__version__} does not use"
        return Finding(what="GPU", level="note", found=found, todo="install a build of torch for its CUDA version")
    return Finding(what="GPU", level="ok", found="none: everything runs on the processor")


def _place(key: str, place: str) -> Finding:
    """Whether a directory can be written in, and how much room there is."""
    from lmq_flows.run.prepare import check_directory

    if "://" in place:
        if place.startswith("s3://") and _installed("s3fs") is None:
            return Finding(what=key, level="breaks", found=f"{place} without s3fs", todo="pip install 'lmq[s3]'")
        return Finding(what=key, level="ok", found=f"{place}, which was not looked at")
    path = Path(place).absolute()
    try:
        check_directory(path, key)
    except InputError as error:
        return Finding(what=key, level="breaks", found=str(error), todo=f"give another place with --{key}")
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    found = f"{path}: {free / 1e9:.1f} GB free"
    if free < _LITTLE_DISK_BYTES:
        todo = "`lmq store gc` frees what no run needs; `lmq plan` says how much a run keeps"
        return Finding(what=key, level="note", found=found, todo=todo)
    return Finding(what=key, level="ok", found=found)


def _server() -> Finding:
    """Whether the Prefect server answers that runs would go to."""
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        todo = "for a UI that stays: `lmq serve`, which says what to set"
        return Finding(what="Prefect server", level="ok", found="none set: every run starts one of its own", todo=todo)
    with get_client(sync_client=True, httpx_settings={"timeout": _PATIENCE_S}) as client:
        trouble = client.api_healthcheck()
        served = None if trouble else str(client.api_version())
    if served is None:
        todo = "start it (`lmq serve`), or unset PREFECT_API_URL: then every run starts one of its own"
        return Finding(what="Prefect server", level="breaks", found=f"{url} does not answer: {trouble!r}", todo=todo)
    own = prefect.__version__
    if served.split(".")[:2] != own.split(".")[:2]:
        todo = "install the same version on both sides"
        return Finding(what="Prefect server", level="note", found=f"{url} is {served}, this is {own}", todo=todo)
    return Finding(what="Prefect server", level="ok", found=f"{url} answers, version {served}")


def _hub() -> Finding:
    """Whether models and texts can be fetched; nothing breaks without."""
    import httpx

    url = os.environ.get("HF_ENDPOINT", _HUB)
    offline = "models and texts that are here already work"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(what="hub", level="note", found=f"switched off by HF_HUB_OFFLINE; {offline}")
    try:
        httpx.head(url, timeout=_PATIENCE_S, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = f"{url} does not answer ({type(error).__name__}); {offline}"
        return Finding(what="hub", level="note", found=found, todo="give directories, .gguf files or package:NAME/FILE")
    return Finding(what="hub", level="ok", found=f"{url} answers")
