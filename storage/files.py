"""Files of a store on any fsspec file system: whole or not there, with requests repeated when the storage fails.

Two kinds of error leave this module besides FileNotFoundError: BadStore for what no repetition will change
(no such bucket, no credentials, not allowed), and StoreError when a storage kept failing. Listings are never
remembered: another machine may have written meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import conf

from lmq_storage.errors import StoreError
from lmq_storage.names import checked_url
from lmq_storage.processes import process_token
from lmq_storage.retry import error_code, retry

_CHUNK_BYTES = 4 << 20


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock between the processes and threads of this machine; the system releases it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class StoreFiles:
    """Files below one URL. Paths are relative to it and have `/` between their parts."""

    def __init__(self, url: str):
        self.url = checked_url(url)
        self.fs, root = fsspec.url_to_fs(url, **_options(url))
        self.root = root.rstrip("/")
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        self.is_local = protocol in ("file", "local")

    def full(self, path: str) -> str:
        """The path as the file system knows it."""
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes:
        """Bytes of a small file. Raises FileNotFoundError."""
        return self._ask("read", path, lambda: self.fs.cat_file(self.full(path)))

    def size(self, path: str) -> int | None:
        """Size in bytes, or None when there is no such file."""
        try:
            return self._ask("look at", path, lambda: int(self.fs.size(self.full(path))))
        except FileNotFoundError:
            return None

    def modified(self, path: str) -> float:
        """Time of the last change by the storage's clock, in seconds since the epoch. Raises FileNotFoundError."""
        return self._ask("look at", path, lambda: float(self.fs.modified(self.full(path)).timestamp()))

    def sha256(self, path: str) -> str:
        """Hex sha256 of the bytes as they are in the storage. Raises FileNotFoundError."""

        def digest() -> str:
            found = hashlib.sha256()
            with self.fs.open(self.full(path), "rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    found.update(chunk)
            return found.hexdigest()

        return self._ask("read", path, digest)

    def find(self, directory: str) -> list[str]:
        """Paths of all files below a directory, sorted. A storage may leave out those that were just written."""

        def paths() -> list[str]:
            try:
                return self.fs.find(self.full(directory))
            except FileNotFoundError:
                return []

        found = self._ask("list", directory, paths)
        if not found and not self.is_local:
            self._complain_of_no_bucket()
        return sorted(str(path)[len(self.root) + 1 :] for path in found)

    def download(self, path: str, target: Path) -> None:
        """Copy a file to this machine. Raises FileNotFoundError."""
        self._ask("read", path, lambda: self.fs.get_file(self.full(path), str(target)))

    def upload(self, source: Path, path: str) -> None:
        """Put a file of this machine in its place: moved on a local file system, else copied."""
        if self.is_local:
            self._parent(path)
            source.replace(self.full(path))
            return
        self._ask("write", path, lambda: self._put(source, path))

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, replacing what is there."""
        if self.is_local:
            with self._partial(path, data) as partial:
                partial.replace(self.full(path))
            return
        self._ask("write", path, lambda: self._pipe(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one already; returns whether it was written.

        Decided by the storage itself: a hard link on local file systems, a conditional request (`If-None-Match: *`)
        on S3. Other file systems get fsspec's `mode="create"`, which looks first and then writes. A request whose
        answer was lost may say that the file is there when it is ours; look at what is there.
        """
        if self.is_local:
            with self._partial(path, data) as partial:
                return _link(partial, Path(self.full(path)))
        try:
            self._ask("write", path, lambda: self._pipe(path, data, mode="create"))
        except FileExistsError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Remove a file that may be gone already."""
        if self.is_local:
            self._parent(path, make=False)
        try:
            self._ask("remove", path, lambda: self.fs.rm_file(self.full(path)))
        except FileNotFoundError:
            return

    def now(self) -> float:
        """The time by the storage's clock: that of a file just written."""
        path = f"tmp/{process_token()}-{uuid.uuid4().hex[:12]}.clock"
        self.write(path, b"")
        try:
            return self.modified(path)
        finally:
            self.remove(path)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a local store's lock. A remote store has none."""
        if not self.is_local:
            yield
            return
        with file_lock(Path(self.full(f"locks/{name}"))):
            yield

    def _ask(self, what: str, path: str, call: Any) -> Any:
        return call() if self.is_local else retry(f"{what} {path} in {self.url}", call)

    def _complain_of_no_bucket(self) -> None:
        """S3 lists a bucket that does not exist as empty; only reading from it tells."""
        try:
            self.read("bucket-is-there")
        except FileNotFoundError:
            return

    def _put(self, source: Path, path: str) -> None:
        self._in_directory(path, lambda: self.fs.put_file(str(source), self.full(path)))

    def _in_directory(self, path: str, write: Callable[[], Any]) -> None:
        """Write a file, making its directory where there are directories; a bucket that is missing stays so."""
        try:
            write()
        except FileNotFoundError as error:
            if error_code(error) is not None:
                raise
            self.fs.makedirs(self.full(path).rpartition("/")[0], exist_ok=True)
            write()

    def _pipe(self, path: str, data: bytes, **options: str) -> None:
        try:
            self._in_directory(path, lambda: self.fs.pipe_file(self.full(path), data, **options))
        except OSError as error:
            if options and error_code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(path) from error
            raise

    def _parent(self, path: str, make: bool = True) -> Path:
        """Directory of a local file, made. Raises StoreError where a link leads it out of the store."""
        parent = Path(self.full(path)).parent
        if not parent.resolve().is_relative_to(Path(self.root).resolve()):
            raise StoreError(f"{parent} leads out of the store {self.url}; remove that link")
        if make:
            parent.mkdir(parents=True, exist_ok=True)
        return parent

    @contextmanager
    def _partial(self, path: str, data: bytes) -> Iterator[Path]:
        """A local file with these bytes, on its way to `path`; in `tmp/`, where it is found when this process dies."""
        self._parent(path)
        partial = self._parent("tmp/x") / f"{process_token()}-{uuid.uuid4().hex[:12]}"
        try:
            partial.write_bytes(data)
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; its only writer holds the lock
        if target.exists():
            return False
        source.replace(target)
    return True


def _options(url: str) -> dict[str, Any]:
    """Options of remote file systems: no memory of listings, and one place that asks again (ours), not three."""
    protocol, found, _ = url.partition("://")
    if not found or protocol in ("file", "local"):
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            **conf.get(protocol, {}).get("config_kwargs", {}),
        }
    return options
