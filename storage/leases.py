"""What runs need: leases of runs in progress, and the lists that finished runs leave.

A run writes its lease when it starts and rewrites it as it goes: which artifacts it uses, and that it still lives.
A run that ended well is replaced by its list, `runs/<run>.json`; the lease of one that failed or was killed stays
and tells what would be lost. Whether the holder of a lease lives is asked of the system where it runs on this
machine; of another machine's, whether it was rewritten within the last hour of the storage's own clock. The
machine's clock plays no part.
"""

from __future__ import annotations

import json
import logging
import platform
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from lmq_storage.errors import StoreError
from lmq_storage.files import StoreFiles
from lmq_storage.names import checked_name
from lmq_storage.processes import counts_as_alive, process_token
from lmq_storage.store import ArtifactStore

_log = logging.getLogger(__name__)

BEAT_S = 60.0
"""Seconds between signs of life; what was used since goes with them."""


class Lease:
    """Held while a run is in progress: `with Lease(store, "demo") as lease: lease.use([ref.uri])`.

    Leaving the block by an error leaves the lease behind as that of an unfinished run, which `finish` of a later run of
    the same name removes. Leaving it otherwise removes the lease.
    """

    def __init__(self, store: ArtifactStore, run: str):
        self._files = store.storage
        self._run = checked_name(run)
        self._path = f"leases/{run}.{process_token()}-{uuid.uuid4().hex[:8]}.json"
        self._uris: set[str] = set()
        self._since: float | None = None
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._heart = threading.Thread(target=self._beat, name=f"lease of {run}", daemon=True)

    def __enter__(self) -> Lease:
        self._write()
        self._since = self._files.modified(self._path)
        self._write()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        try:
            if kind is None:
                self._files.remove(self._path)
            else:
                self._write(ended=True)
        except (StoreError, OSError) as failure:
            _log.warning("the lease %s could not be ended, so its run still looks in progress: %s", self._path, failure)

    def use(self, uris: Iterable[str], *, at_once: bool = True) -> None:
        """Note artifacts that the run needs; `at_once`: they are kept from the moment this returns."""
        with self._writing:
            new = set(uris) - self._uris
            self._uris |= new
        if new and at_once:
            self._write()

    def finish(self, uris: Iterable[str]) -> None:
        """The run has all it needs: leave the list of it, and remove the leases of earlier attempts."""
        text = "".join(f"{uri}\n" for uri in sorted(set(uris)))
        self._files.write(f"runs/{self._run}.json", text.encode())
        for path in lease_paths(self._files):
            lease = read_lease(self._files, path, now=None)
            if lease is not None and lease.run == self._run and not lease.in_progress:
                self._files.remove(path)

    def _write(self, ended: bool = False) -> None:
        with self._writing:
            text = json.dumps(
                {
                    "run": self._run,
                    "host": platform.node(),
                    "since": self._since,
                    "ended": ended,
                    "uris": sorted(self._uris),
                },
                indent=1,
            )
            self._files.write(self._path, text.encode())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._write()
            except (StoreError, OSError) as failure:
                _log.warning("the lease %s could not be renewed: %s", self._path, failure)


@dataclass(frozen=True, kw_only=True)
class HeldLease:
    """A lease as others see it. `since` is when the run began, by the storage's clock."""

    path: str
    run: str
    host: str
    in_progress: bool
    since: float | None
    modified: float
    uris: frozenset[str] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class NeededRun:
    """A run and the artifacts it needs. `state` is "in progress", "unfinished" (failed or killed) or "finished"."""

    name: str
    state: str
    modified: float
    uris: frozenset[str] = field(repr=False)


def lease_paths(files: StoreFiles) -> list[str]:
    """Paths of all leases."""
    return [path for path in files.find("leases") if path.endswith(".json")]


def read_lease(files: StoreFiles, path: str, now: float | None) -> HeldLease | None:
    """A lease, or None when it is gone or unreadable. Without `now`, another machine's counts as in progress."""
    try:
        modified = files.modified(path)
        data = json.loads(files.read(path))
        run, host, uris = checked_name(data["run"]), str(data["host"]), frozenset(map(str, data["uris"]))
        ended, since = bool(data["ended"]), data["since"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, StoreError) as error:
        _log.warning("%s cannot be read as a lease and is ignored: %s", path, error)
        return None
    alive = counts_as_alive(path.removeprefix(f"leases/{run}."), 0.0 if now is None else now - modified)
    return HeldLease(
        path=path,
        run=run,
        host=host,
        in_progress=alive and not ended,
        since=float(since) if isinstance(since, int | float) else None,
        modified=modified,
        uris=uris,
    )


def read_leases(files: StoreFiles, now: float) -> list[HeldLease]:
    """All leases."""
    return [lease for path in lease_paths(files) if (lease := read_lease(files, path, now)) is not None]


def needed_runs(files: StoreFiles, leases: Iterable[HeldLease]) -> list[NeededRun]:
    """Every run that is known, newest first; those in progress before all."""
    runs = [
        NeededRun(
            name=lease.run,
            state="in progress" if lease.in_progress else "unfinished",
            modified=lease.modified,
            uris=lease.uris,
        )
        for lease in leases
    ]
    for path in files.find("runs"):
        try:
            uris = frozenset(files.read(path).decode().split())
            name = path.removeprefix("runs/").removesuffix(".json")
            runs.append(NeededRun(name=name, state="finished", modified=files.modified(path), uris=uris))
        except FileNotFoundError:
            continue
    return sorted(runs, key=lambda run: (run.state != "in progress", -run.modified))
