"""What is in a store and for which run, and removing what no run needs any more."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmq_storage.artifact import Manifest
from lmq_storage.errors import StoreError
from lmq_storage.leases import HeldLease, NeededRun, needed_runs, read_leases
from lmq_storage.materialize import remove_abandoned
from lmq_storage.names import checked_name, is_sha256
from lmq_storage.processes import is_alive
from lmq_storage.store import ArtifactStore, manifest_path

_INSTANT_S = 1e-6

_BLOB = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """A run of the store with what it needs: `own_bytes` are needed by no other run, the rest of them is shared."""

    run: NeededRun
    age_s: float
    artifacts: int
    total_bytes: int
    own_bytes: int
    missing: int


@dataclass(frozen=True, kw_only=True)
class StageSize:
    """What one stage made."""

    stage: str
    artifacts: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a store. `unneeded_bytes` belong to artifacts that no run names."""

    runs: tuple[RunSize, ...]
    stages: tuple[StageSize, ...]
    unneeded_artifacts: int
    unneeded_bytes: int


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What was removed, or would be."""

    uris: tuple[str, ...]
    freed_bytes: int
    leftovers: int = 0
    kept_for: tuple[str, ...] = field(default=())


def list_contents(store: ArtifactStore) -> Contents:
    """What is in the store, by run (newest first) and by stage. Reads manifests only; equal bytes count once."""
    now = store.storage.now()
    manifests = {manifest.ref.uri: manifest for manifest in store.manifests()}
    runs = needed_runs(store.storage, read_leases(store.storage, now))
    by_run = [_blobs(manifests, run.uris) for run in runs]
    sizes = []
    for index, (run, blobs) in enumerate(zip(runs, by_run, strict=True)):
        others = set().union(*(blobs for other, blobs in enumerate(by_run) if other != index))
        found = run.uris & manifests.keys()
        sizes.append(
            RunSize(
                run=run,
                age_s=max(0.0, now - run.modified),
                artifacts=len(found),
                total_bytes=sum(blobs.values()),
                own_bytes=sum(size for sha256, size in blobs.items() if sha256 not in others),
                missing=len(run.uris) - len(found),
            )
        )
    needed = set().union(*(run.uris for run in runs))
    unneeded = manifests.keys() - needed
    wanted = _blobs(manifests, needed)
    left_over = {sha256: size for sha256, size in _blobs(manifests, unneeded).items() if sha256 not in wanted}
    return Contents(
        runs=tuple(sizes),
        stages=_by_stage(manifests),
        unneeded_artifacts=len(unneeded),
        unneeded_bytes=sum(left_over.values()),
    )


def collect_garbage(store: ArtifactStore, *, keep_runs: int, keep_hours: float, dry_run: bool) -> Garbage:
    """Remove what neither the newest `keep_runs` runs nor runs in progress need and is older than `keep_hours`.

    Kept besides: everything made since the oldest run in progress began. Leases are read again before and after
    manifests are removed, and what a run has taken up in between is put back. Bytes go last, so that a kill at any
    moment leaves nothing half there.
    """
    files = store.storage
    now = files.now()
    leases = read_leases(files, now)
    runs = _kept(needed_runs(files, leases), keep_runs)
    older_than = _older_than(now, keep_hours, leases)
    removable = _removable(store, runs, older_than)
    if not dry_run:
        removed = {uri: files.read(manifest_path(*uri.split("/"))) for uri in removable}
        in_use = _in_use(read_leases(files, now))
        for uri in removable:
            if uri not in in_use:
                files.remove(manifest_path(*uri.split("/")))
        in_use = _in_use(read_leases(files, now))
        for uri in sorted(in_use & removed.keys()):
            files.create(manifest_path(*uri.split("/")), removed[uri])
        removable = [uri for uri in removable if uri not in in_use]
        for uri in removable:
            files.remove(
                f"records/{uri.replace('/', '-')}"
            )  # notes of Prefect, which it kept until its cache was left out
    freed, kept_content = _remove_blobs(store, set(removable), runs, older_than, dry_run)
    leftovers = _remove_leftovers(store, kept_content, leases, runs, older_than, dry_run)
    kept_for = tuple(dict.fromkeys(f"{run.name} ({run.state})" for run in runs))
    return Garbage(uris=tuple(removable), freed_bytes=freed, leftovers=leftovers, kept_for=kept_for)


def _kept(runs: list[NeededRun], keep_runs: int) -> list[NeededRun]:
    """Runs in progress, and those of the newest `keep_runs` names; every attempt at such a run is kept."""
    newest = list(dict.fromkeys(run.name for run in sorted(runs, key=lambda run: -run.modified)))[:keep_runs]
    return [run for run in runs if run.state == "in progress" or run.name in newest]


def _older_than(now: float, keep_hours: float, leases: Iterable[HeldLease]) -> float:
    """What is as old as this may go: before the grace period and before any run in progress began.

    What carries the very time that a run began at may be that run's: S3 tells times in whole seconds.
    """
    began = [(lease.since or lease.modified) - _INSTANT_S for lease in leases if lease.in_progress]
    return min([now - 3600 * keep_hours, *began])


def _in_use(leases: Iterable[HeldLease]) -> set[str]:
    return set().union(*(lease.uris for lease in leases if lease.in_progress))


def _removable(store: ArtifactStore, runs: Iterable[NeededRun], older_than: float) -> list[str]:
    needed = set().union(*(run.uris for run in runs))
    found = []
    for stage, key in store.manifest_keys():
        try:
            if f"{stage}/{key}" not in needed and store.storage.modified(manifest_path(stage, key)) <= older_than:
                found.append(f"{stage}/{key}")
        except FileNotFoundError:
            continue
    return found


def _remove_blobs(
    store: ArtifactStore, gone: set[str], runs: Iterable[NeededRun], older_than: float, dry_run: bool
) -> tuple[int, set[str]]:
    """Bytes freed by removing what no manifest names, and the digests of artifacts and of files that are kept.

    What runs need is looked up by name, since a listing may leave it out.
    """
    kept: set[str] = set()
    uris = {f"{stage}/{key}" for stage, key in store.manifest_keys()}.union(*(run.uris for run in runs)) - gone
    for uri in sorted(uris):
        manifest = _manifest(store, uri)
        if manifest is not None:
            kept.add(manifest.content_sha256)
            kept.update(file.sha256 for file in manifest.files.values())
    freed = 0
    for path in store.storage.find("blobs"):
        match = _BLOB.fullmatch(path)
        if match is None or match[2] in kept:
            continue
        try:
            if store.storage.modified(path) > older_than:
                continue
        except FileNotFoundError:
            continue
        freed += store.storage.size(path) or 0
        if not dry_run:
            store.storage.remove(path)
    return freed, kept


def _manifest(store: ArtifactStore, uri: str) -> Manifest | None:
    """The manifest of an artifact that a run or a listing names; None for a name that is none."""
    try:
        stage, key = map(checked_name, uri.split("/"))
    except (ValueError, StoreError):
        return None
    return store.manifest(stage, key)


def _remove_leftovers(
    store: ArtifactStore,
    kept_content: set[str],
    leases: Iterable[HeldLease],
    runs: Iterable[NeededRun],
    older_than: float,
    dry_run: bool,
) -> int:
    """Remove files of dead processes, leases of runs that are not kept, and local copies of what is gone; how many."""
    kept_names = {run.name for run in runs}
    old_leases = [lease.path for lease in leases if not lease.in_progress and lease.run not in kept_names]
    abandoned = [path for path in (store.local_dir / "tmp").glob("*") if _is_abandoned(path, older_than)]
    if not dry_run:
        for lease in old_leases:
            store.storage.remove(lease)
        for path in abandoned:
            _remove(path)
        remove_abandoned(store.laid_out / "x")
    return len(old_leases) + len(abandoned) + _remove_copies(store, kept_content, older_than, dry_run)


def _is_abandoned(path: Path, older_than: float) -> bool:
    """Whether the process that was writing a file died; of one without a known process, whether it is old."""
    alive = is_alive(path.name)
    try:
        return alive is False or (alive is None and path.lstat().st_mtime <= older_than)
    except FileNotFoundError:
        return False


def _remove_copies(store: ArtifactStore, kept_content: set[str], older_than: float, dry_run: bool) -> int:
    """Remove directories laid out, and a remote store's cached bytes, of artifacts that are gone; how many.

    What was laid out lately may be of an artifact that was published after the manifests were read.
    """
    prefixes = {sha256[:32] for sha256 in kept_content}
    with store.laying_out():
        copies = [path for path in store.laid_out.glob("[0-9a-f]*") if path.name not in prefixes]
        if not store.is_local:
            cached = (store.local_dir / "blobs").glob("??/*")
            copies += [path for path in cached if is_sha256(path.name) and path.name not in kept_content]
        copies = [path for path in copies if path.lstat().st_mtime <= older_than]
        if not dry_run:
            for path in copies:
                _remove(path)
    return len(copies)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _blobs(manifests: Mapping[str, Manifest], uris: Iterable[str]) -> dict[str, int]:
    """Size of every file of some artifacts, by digest."""
    return {file.sha256: file.size_bytes for uri in uris if uri in manifests for file in manifests[uri].files.values()}


def _by_stage(manifests: Mapping[str, Manifest]) -> tuple[StageSize, ...]:
    stages: dict[str, list[str]] = {}
    for uri, manifest in manifests.items():
        stages.setdefault(manifest.stage, []).append(uri)
    return tuple(
        StageSize(stage=stage, artifacts=len(uris), total_bytes=sum(_blobs(manifests, uris).values()))
        for stage, uris in sorted(stages.items())
    )
