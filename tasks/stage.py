"""A stage: a named, versioned step from input artifacts to one output artifact.

A stage's body opens its inputs, calls the library and writes files into `job.output`; everything around
it (key, publishing, manifest) is done here, once. Nothing in this file knows of Prefect.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lmq.errors import InputError, LmqError
from lmq_storage import ArtifactRef, ArtifactStore, DamagedArtifact, artifact_key
from lmq_tasks.process_memory import PeakMemory, keep_freed_memory

JsonDict = dict[str, Any]
"""Task parameters are JSON values, so that any worker on any machine can read them."""


@dataclass(frozen=True, kw_only=True)
class ModelLocation:
    """Where a machine finds a model's files: a directory, an artifact of the store, or a hub revision.

    `kind` is "directory" (`place` is a path), "artifact" (`place` is `stage/key`) or "hub"
    (`place` is `org/name@revision`).
    """

    kind: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where and how work is done: where the model's files and the text lie on this machine, on what device.

    Nothing of it enters a key; the content of model and text does, as digests. `places` are other files of this
    machine by what they are to the stage. `states` says what of a run was cached and what ran (by artifact URI), for
    the report.
    """

    store_url: str
    model: ModelLocation | None = None
    text: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads_per_worker: int = 1

    def to_json(self) -> JsonDict:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """Inverse of `to_json`."""
        model = ModelLocation(**data["model"]) if data["model"] else None
        return cls(**{**data, "model": model})


_under_way: dict[Path, tuple[str, float]] = {}
"""Stage and share of what is made in this process, by its directory; a share is known where the stage counts."""


def shares_under_way(stage: str) -> list[float]:
    """How far the layers or variants of a stage are that this process works on, from 0 to 1, where the stage counts."""
    return sorted((share for name, share in list(_under_way.values()) if name == stage), reverse=True)


class Job:
    """What a stage's body works with: its configuration, its inputs as local files, a directory to write into."""

    def __init__(self, store: ArtifactStore, site: Site, config: Mapping[str, Any], inputs: Inputs, output: Path):
        self.store = store
        self.site = site
        self.config = config
        self.output = output
        self._inputs = inputs

    def advance(self, share: float) -> None:
        """Say how far this is, from 0 to 1."""
        if self.output in _under_way:
            _under_way[self.output] = (_under_way[self.output][0], share)

    @property
    def device(self) -> torch.device:
        """Device for heavy tensor work."""
        return torch.device(self.site.device)

    def ref(self, name: str) -> ArtifactRef:
        """Reference of a single input."""
        value = self._inputs[name]
        assert not isinstance(value, list), f"input {name!r} is a list"
        return ArtifactRef.from_json(value["artifact"])

    def input(self, name: str, file: str) -> Path:
        """Local path of a file of a single input."""
        return self.store.path(self.ref(name), file)

    def file_of(self, name: str) -> str | None:
        """The one file that a single input stands for, None where it stands for the whole artifact."""
        value = self._inputs[name]
        assert not isinstance(value, list), f"input {name!r} is a list"
        file: str | None = value.get("file")
        return file

    def inputs(self, name: str, file: str) -> list[Path]:
        """Local paths of the same file in each artifact of a list of inputs, or of the one that an input stands for."""
        files = [value.get("file") or file for value in self._list(name)]
        return [self.store.path(ref, own) for ref, own in zip(self.refs(name), files, strict=True)]

    def refs(self, name: str) -> list[ArtifactRef]:
        """References of a list of inputs."""
        return [ArtifactRef.from_json(value["artifact"]) for value in self._list(name)]

    def _list(self, name: str) -> list[Input]:
        values = self._inputs[name]
        assert isinstance(values, list), f"input {name!r} is not a list"
        return values

    def has(self, name: str) -> bool:
        """Whether the input was given."""
        return name in self._inputs


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline. Raise `version` when the same inputs would give other bytes.

    `made_by` are the functions that its bytes come from, where the body is not one that a module defines. `result` says
    in a few words what an artifact came to, given the path of each of its files: "perplexity 14.04".
    """

    name: str
    version: int
    schema: str
    body: Callable[[Job], None]
    made_by: tuple[Callable[..., Any], ...] = ()
    result: Callable[[Callable[[str], Path]], str] | None = None


Input = JsonDict
"""`{"artifact": ArtifactRef as JSON, "file": name or None}`: with a file, only that file's bytes enter the key."""

Inputs = Mapping[str, Input | list[Input]]


def stage(
    name: str, *, version: int, schema: str, result: Callable[[Callable[[str], Path]], str] | None = None
) -> Callable[[Callable[[Job], None]], Stage]:
    """Decorate a function `body(job)` to make it a Stage."""

    def decorate(body: Callable[[Job], None]) -> Stage:
        return Stage(name, version, schema, body, result=result)

    return decorate


def input_digests(store: ArtifactStore, inputs: Inputs) -> dict[str, str | list[str]]:
    """Content digests of the inputs, as they enter the key."""

    def digest(item: Input) -> str:
        if item.get("file") is None:
            return item["artifact"]["sha256"]
        ref = ArtifactRef.from_json(item["artifact"])
        manifest = store.manifest(ref.stage, ref.key)
        if manifest is None or item["file"] not in manifest.files:
            raise LmqError(f"artifact {ref.uri} has no file {item['file']!r}; run again to make it anew")
        return manifest.files[item["file"]].sha256

    return {
        name: [digest(item) for item in value] if isinstance(value, list) else digest(value)
        for name, value in inputs.items()
    }


def stage_key(store: ArtifactStore, stage: Stage, config: Mapping[str, Any], inputs: Inputs) -> str:
    """Key of the artifact that `stage` makes of these."""
    return artifact_key(stage.name, stage.version, config, input_digests(store, inputs))


def run_stage(stage: Stage, key: str, site: Site, config: Mapping[str, Any], inputs: Inputs) -> ArtifactRef:
    """Make and publish the artifact of `key`, or return the one that is there already."""
    store = open_store(site.store_url)
    existing = store.find(stage.name, key)
    if existing is not None:
        return existing
    keep_freed_memory()
    torch.set_num_threads(site.threads_per_worker)
    started = time.perf_counter()
    try:
        with store.workspace() as output, PeakMemory() as memory:
            with _counted(stage, output):
                stage.body(Job(store, site, config, inputs, output))
            files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
            return store.publish(
                stage=stage.name,
                key=key,
                schema=stage.schema,
                files=files,
                algorithm_version=stage.version,
                config=config,
                inputs=input_digests(store, inputs),
                versions=library_versions(),
                seconds=time.perf_counter() - started,
                peak_memory_bytes=memory.read(),
            )
    except (OSError, SafetensorError) as error:
        if _is_gone(error, store):
            raise DamagedArtifact(f"an input of {stage.name} was removed ({error}); it will be made anew") from error
        if not _is_disk_full(error):
            raise
        raise LmqError(
            f"no space left in the store {site.store_url} during {stage.name}; nothing half-written was kept. "
            "Free space (`lmq store gc`) or set `store` to another place, then run again: finished work is kept"
        ) from error


@contextmanager
def _counted(stage: Stage, output: Path) -> Iterator[None]:
    _under_way[output] = (stage.name, 0.0)
    try:
        yield
    finally:
        del _under_way[output]


def _is_gone(error: OSError | SafetensorError, store: ArtifactStore) -> bool:
    """Whether a file of the store, which was there when its path was asked for, was not when it was opened."""
    return isinstance(error, FileNotFoundError) and str(store.local_dir) in str(error)


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    """safetensors tells of the system's error in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full)


@functools.lru_cache(maxsize=8)
def open_store(url: str) -> ArtifactStore:
    """The store of a URL, one object per process, so that a file is verified once.

    Raises InputError for a URL that no file system here understands.
    """
    try:
        return ArtifactStore(url)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"the store {url!r} cannot be opened ({error}); give a directory, or a URL of a file system "
            "whose fsspec package is installed"
        ) from error


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what computes, for manifests and reports."""
    names = ("lmq", "torch", "transformers", "hqq", "numpy", "scipy", "pyarrow", "prefect")
    return {name: importlib.metadata.version(name) for name in names}


def as_inputs(refs: Mapping[str, ArtifactRef | Sequence[ArtifactRef]]) -> Inputs:
    """Inputs in the form tasks take, from references."""

    def wrap(ref: ArtifactRef) -> Input:
        return {"artifact": ref.to_json(), "file": None}

    return {
        name: wrap(value) if isinstance(value, ArtifactRef) else [wrap(ref) for ref in value]
        for name, value in refs.items()
    }
