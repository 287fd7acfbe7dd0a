"""Content-addressed store of artifacts on any fsspec URL.

    blobs/<2 hex>/<sha256>           the bytes of files, named by their content
    manifests/<stage>/<key>.json     what an artifact consists of; written last
    runs/<run>.json                  the artifacts that a finished run needs
    leases/                          those that runs in progress need (`lmq_storage.leases`)
    tmp/, locks/                     files being written and locks, on this machine
    checked                          local bytes that were read whole and were right (`lmq_storage.check_record`)

Bytes are written under a temporary name and get their final name by rename (or, on object stores, by one upload);
the manifest comes last, so an artifact either is there whole or is not there. Two writers of one key, on one
machine or two, do not disturb each other: blobs of equal content are equal, and the first sound manifest stays
(`StoreFiles.create`); the other writer gets its reference. Nothing is synced to the platter: bytes lost with the
power are noticed by size and digest, and made again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lmq_storage.artifact import ArtifactRef, Manifest, StoredFile
from lmq_storage.check_record import CheckRecord
from lmq_storage.checked_files import CheckedFiles, file_sha256
from lmq_storage.errors import DamagedArtifact, StoreError
from lmq_storage.files import StoreFiles, file_lock
from lmq_storage.materialize import lay_out
from lmq_storage.names import checked_file_name, checked_name
from lmq_storage.processes import process_token


class ArtifactStore:
    """Artifacts under one URL (`store`, `/data/store`, `s3://bucket/lmq`, `memory://lmq`).

    `local_dir` is on this machine: the store itself, or where a remote store's bytes are kept once they were
    read (`cache_dir`).
    """

    def __init__(self, url: str, cache_dir: Path | None = None):
        self.url = url
        self.storage = StoreFiles(url)
        self.is_local = self.storage.is_local
        self.local_dir = Path(self.storage.root) if self.is_local else (cache_dir or _default_cache_dir(url))
        self.checked = CheckedFiles()
        self._record = CheckRecord(self.local_dir / "checked")

    def __repr__(self) -> str:
        return f"ArtifactStore({self.url!r})"

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """Reference of the artifact if its manifest and all its bytes are there and undamaged, else None.

        Local bytes are checked by digest, once while the file does not change by size, time and inode; remote ones by
        size. `path` and `files`, which bytes are worked with by, read them whole once per process.
        """
        manifest = self.manifest(stage, key)
        if manifest is None or any(not self._blob_is_sound(file) for file in manifest.files.values()):
            return None
        return manifest.ref

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest, or None when it is missing, unreadable or belongs to another version."""
        try:
            return self.read_manifest(stage, key)
        except (FileNotFoundError, DamagedArtifact):
            return None

    def read_manifest(self, stage: str, key: str) -> Manifest:
        """The manifest. Raises FileNotFoundError, and DamagedArtifact saying what is wrong with it."""
        try:
            manifest = Manifest.from_text(self.storage.read(manifest_path(stage, key)).decode())
        except UnicodeDecodeError as error:
            raise DamagedArtifact(f"not a manifest: {error}") from error
        if (manifest.stage, manifest.key) != (stage, key):
            raise DamagedArtifact(f"it is the manifest of {manifest.ref.uri}")
        return manifest

    def path(self, ref: ArtifactRef, name: str) -> Path:
        """Local, verified path of one file of an artifact. Read it; never write to it.

        Raises DamagedArtifact when the manifest or the bytes are missing or altered.
        """
        files = self._manifest_of(ref).files
        if name not in files:
            raise StoreError(f"artifact {ref.uri} has no file {name!r}; it has {', '.join(sorted(files))}")
        return self._local_blob(files[name], f"{ref.uri} file {name}")

    def files(self, ref: ArtifactRef) -> dict[str, Path]:
        """Local, verified paths of all files of an artifact by name."""
        files = self._manifest_of(ref).files
        return {name: self._local_blob(file, f"{ref.uri} file {name}") for name, file in files.items()}

    def materialize(self, ref: ArtifactRef, directory: Path, *, beside: Mapping[str, Path] | None = None) -> Path:
        """Lay the artifact's files out under their names in `directory`, replacing what is there; returns it.

        Large files are hard links where the file system allows; the files `beside` (name → file) are copied to them.
        The directory appears whole or not at all, and stays untouched where it holds exactly these files already.
        """
        beside = beside or {}
        manifest = self.manifest(ref.stage, ref.key)
        if manifest is None or not self._is_laid_out(manifest, directory, beside):
            lay_out(self.files(ref), beside, directory)
        return directory

    def directory(self, ref: ArtifactRef) -> Path:
        """The artifact's files under their names in a directory of this machine that all readers share. Only read it.

        Its age tells `collect_garbage` that somebody reads it.
        """
        directory = self.laid_out / ref.sha256[:32]
        with self.laying_out():
            self.materialize(ref, directory)
            os.utime(directory)
        return directory

    @property
    def laid_out(self) -> Path:
        """Where the directories that readers share lie, named by the first 32 digits of their artifact's digest."""
        return self.local_dir / "laid-out"

    def laying_out(self) -> AbstractContextManager[None]:
        """Held by what makes or removes one of these directories, in any process of this machine."""
        return file_lock(self.local_dir / "locks" / "laid-out")

    def _is_laid_out(self, manifest: Manifest, directory: Path, beside: Mapping[str, Path]) -> bool:
        there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
        return (
            there == {*manifest.files, *beside}
            and all(self.checked.matches(directory / name, file) for name, file in manifest.files.items())
            and all((directory / name).read_bytes() == file.read_bytes() for name, file in beside.items())
        )

    def _manifest_of(self, ref: ArtifactRef) -> Manifest:
        manifest = self.manifest(ref.stage, ref.key)
        if manifest is None or manifest.content_sha256 != ref.sha256:
            raise DamagedArtifact(f"artifact {ref.uri} is gone or was replaced; run again to make it anew")
        return manifest

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A temporary directory to write files in before they are published; removed afterwards."""
        with tempfile.TemporaryDirectory(dir=self._local_tmp(), prefix=f"{process_token()}-") as name:
            yield Path(name)

    def publish(
        self,
        *,
        stage: str,
        key: str,
        schema: str,
        files: Mapping[str, Path],
        algorithm_version: int,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        seconds: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> ArtifactRef:
        """Move `files` (name → local path) into the store and write the manifest; returns the reference.

        If a sound artifact of this key is there already, it stays and its reference is returned.
        """
        for name in files:
            checked_file_name(name)
        stored = {name: self._store_blob(path) for name, path in sorted(files.items())}
        manifest = Manifest(
            stage=stage,
            key=key,
            schema=schema,
            files=stored,
            algorithm_version=algorithm_version,
            config=config or {},
            inputs=inputs or {},
            versions=versions or {},
            host=platform.node(),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
        )
        return self._publish_manifest(manifest)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file beside the artifacts, atomically (`runs/demo.json`)."""
        folder, _, file = name.partition("/")
        self.storage.write(f"{checked_name(folder)}/{checked_name(file)}", text.encode())

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """All readable manifests, or those of one stage, by stage and key."""
        for found_stage, key in self.manifest_keys(stage):
            manifest = self.manifest(found_stage, key)
            if manifest is not None:
                yield manifest

    def manifest_keys(self, stage: str | None = None) -> list[tuple[str, str]]:
        """Stage and key of every manifest there is, readable or not."""
        folder = "manifests" + (f"/{checked_name(stage)}" if stage else "")
        parts = (path.split("/") for path in self.storage.find(folder) if path.endswith(".json"))
        return [(part[1], part[2].removesuffix(".json")) for part in parts if len(part) == 3 and part[2][0] != "."]

    def distrust(self, sha256: str) -> None:
        """Forget that bytes of this digest were right: they are read whole before they count as there again."""
        blob = self.local_dir / blob_path(sha256)
        self.checked.forget(blob)
        self._record.drop(blob)

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────────

    def _local_tmp(self) -> Path:
        directory = self.local_dir / "tmp"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _blob_is_sound(self, file: StoredFile) -> bool:
        """Whether a blob was right when it was last read, which is now where it changed since."""
        if not self.is_local:
            return self.storage.size(blob_path(file.sha256)) == file.size_bytes
        path = self.local_dir / blob_path(file.sha256)
        return self._record.holds(path) or self._is_right(path, file)

    def _is_right(self, path: Path, file: StoredFile) -> bool:
        """Whether a local blob has its bytes, read whole once per process; the record is told."""
        if not self.checked.matches(path, file):
            self._record.drop(path)
            return False
        if not self._record.holds(path):
            self._record.add(path)
        return True

    def _local_blob(self, file: StoredFile, label: str) -> Path:
        path = self.local_dir / blob_path(file.sha256)
        if self._is_right(path, file):
            return path
        if self.is_local:
            raise DamagedArtifact(f"{label} is missing or damaged ({path}); run again to make it anew")
        for _ in range(2):  # a broken transfer is not yet a damaged file
            if self._fetch(file, path, label):
                return path
        self.storage.remove(blob_path(file.sha256))  # by its name it is worth nothing to anybody; now it is a miss
        raise DamagedArtifact(f"{label} was damaged in {self.url}; run again to make it anew")

    def _fetch(self, file: StoredFile, path: Path, label: str) -> bool:
        """Copy a remote file into the local cache; returns whether it has its bytes."""
        partial = self._local_tmp() / f"{process_token()}-{uuid.uuid4().hex[:12]}"
        try:
            self.storage.download(blob_path(file.sha256), partial)
            if not self.checked.matches(partial, file):
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)
            return self.checked.matches(path, file)
        except FileNotFoundError as error:
            raise DamagedArtifact(f"{label} is missing from {self.url}; run again to make it anew") from error
        finally:
            self.checked.forget(partial)
            partial.unlink(missing_ok=True)

    def _store_blob(self, path: Path) -> StoredFile:
        """Put a file in its place. One that is there already is written again, or touched.

        Its age tells `collect_garbage` that somebody wants it now, before the manifest says so.
        """
        file = StoredFile(file_sha256(path), path.stat().st_size)
        target = blob_path(file.sha256)
        there = self.local_dir / target
        if self.is_local and self.checked.matches(there, file):
            try:
                os.utime(there)
                self._remember(there)
                return file
            except FileNotFoundError:
                pass  # removed this moment
        path.chmod(0o444)
        self.storage.upload(path, target)
        if self.is_local:
            self._remember(there)
        return file

    def _remember(self, blob: Path) -> None:
        """Take note of a local blob that has its bytes."""
        self.checked.remember(blob)
        self._record.add(blob)

    def _publish_manifest(self, manifest: Manifest) -> ArtifactRef:
        """Write the manifest unless a sound artifact is there; returns the reference of what is there then.

        An unsound one is replaced. If two machines replace it at the same moment the last one stays, and whoever holds
        the other's reference finds at the next read that its digest is not the one.
        """
        path, text = manifest_path(manifest.stage, manifest.key), manifest.to_text().encode()
        with self.storage.lock(checked_name(manifest.stage)):
            existing = self.find(manifest.stage, manifest.key)
            if existing is not None:
                return existing
            if not self.storage.create(path, text):
                existing = self.find(manifest.stage, manifest.key)
                if existing is not None:
                    return existing
                self.storage.write(path, text)
            there = self.manifest(manifest.stage, manifest.key)
        return there.ref if there is not None else manifest.ref


def manifest_path(stage: str, key: str) -> str:
    """Path of a manifest in its store."""
    return f"manifests/{checked_name(stage)}/{checked_name(key)}.json"


def blob_path(sha256: str) -> str:
    """Path of bytes in their store."""
    return f"blobs/{sha256[:2]}/{sha256}"


def _default_cache_dir(url: str) -> Path:
    """Where this user's copies of a remote store's files are kept. Raises StoreError when others can write there."""
    own = Path(tempfile.gettempdir()) / f"lmq-cache-{os.getuid()}"
    own.mkdir(exist_ok=True, mode=0o700)
    status = own.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
        raise StoreError(f"{own} can be written by other users, who could alter what is read there; remove it")
    return own / hashlib.sha256(url.encode()).hexdigest()[:16]
