"""Content-addressed store of artifacts on any fsspec URL.

    blobs/<2 hex>/<sha256>           the bytes of files, named by their content
    manifests/<stage>/<key>.json     what an artifact consists of; written last
    records/                         the workflow engine's own notes of finished tasks
    tmp/, locks/                     files being written and locks, on this machine

Bytes are written under a temporary name and get their final name by rename (or, on object stores, by one
upload); the manifest comes last, so an artifact either is there whole or is not there. Two writers of one
key do not disturb each other: blobs of equal content are equal, and on a local store the first manifest
stays. Nothing is synced to the platter: bytes lost with the power are noticed by size and digest, and made
again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from lmq_storage.artifact import ArtifactRef, DamagedArtifact, Manifest, StoredFile, StoreError

_COPY_BELOW_BYTES = 1 << 20


class ArtifactStore:
    """Artifacts under one URL (`store`, `/data/store`, `s3://bucket/lmq`, `memory://lmq`).

    `local_dir` is on this machine: the store itself, or where a remote store's bytes are kept once they were
    read (`cache_dir`).
    """

    def __init__(self, url: str, cache_dir: Path | None = None):
        self.url = url
        self._fs, root = fsspec.url_to_fs(url)
        self._root = root.rstrip("/")
        protocol = self._fs.protocol if isinstance(self._fs.protocol, str) else self._fs.protocol[0]
        self.is_local = protocol in ("file", "local")
        self.local_dir = Path(self._root) if self.is_local else (cache_dir or _default_cache_dir(url))
        self._verified: dict[str, tuple[int, int]] = {}

    def __repr__(self) -> str:
        return f"ArtifactStore({self.url!r})"

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """Reference of the artifact if its manifest and all its bytes are there and undamaged, else None.

        Local bytes are checked by digest (once per process while the file does not change), remote ones by size.
        """
        manifest = self.manifest(stage, key)
        if manifest is None or any(not self._blob_is_sound(file) for file in manifest.files.values()):
            return None
        return manifest.ref

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest, or None when it is missing, unreadable or belongs to another version."""
        try:
            return Manifest.from_text(self._fs.cat_file(self._manifest_path(stage, key)).decode())
        except (FileNotFoundError, DamagedArtifact, UnicodeDecodeError):
            return None

    def path(self, ref: ArtifactRef, name: str) -> Path:
        """Local, verified path of one file of an artifact. Read it; never write to it.

        Raises DamagedArtifact when the manifest or the bytes are missing or altered.
        """
        manifest = self.manifest(ref.stage, ref.key)
        if manifest is None or manifest.content_sha256 != ref.sha256:
            raise DamagedArtifact(f"artifact {ref.uri} is gone or was replaced; run again to make it anew")
        if name not in manifest.files:
            raise StoreError(f"artifact {ref.uri} has no file {name!r}; it has {', '.join(sorted(manifest.files))}")
        return self._local_blob(manifest.files[name], f"{ref.uri} file {name}")

    def files(self, ref: ArtifactRef) -> dict[str, Path]:
        """Local, verified paths of all files of an artifact by name."""
        manifest = self.manifest(ref.stage, ref.key)
        if manifest is None:
            raise DamagedArtifact(f"artifact {ref.uri} is gone; run again to make it anew")
        return {name: self.path(ref, name) for name in manifest.files}

    def materialize(self, ref: ArtifactRef, directory: Path, *, beside: Mapping[str, Path] | None = None) -> Path:
        """Lay the artifact's files out under their names in `directory`, replacing what is there; returns it.

        Large files are hard links where the file system allows; the files `beside` (name → file) are copied to them.
        The directory appears whole or not at all, and stays untouched where it holds exactly these files already.
        """
        beside = beside or {}
        manifest = self.manifest(ref.stage, ref.key)
        if manifest is not None and self._is_laid_out(manifest, directory, beside):
            return directory
        partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
        try:
            for name, blob in self.files(ref).items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(blob, target)
            for name, file in beside.items():
                shutil.copyfile(file, partial / name)
            _replace_directory(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return directory

    def _is_laid_out(self, manifest: Manifest, directory: Path, beside: Mapping[str, Path]) -> bool:
        there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
        return (
            there == {*manifest.files, *beside}
            and all(self._matches(directory / name, file) for name, file in manifest.files.items())
            and all((directory / name).read_bytes() == file.read_bytes() for name, file in beside.items())
        )

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A temporary directory to write files in before they are published; removed afterwards."""
        parent = self.local_dir / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as name:
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
        self._write_atomically(f"{self._root}/{name}", text.encode())

    # ── looking after ────────────────────────────────────────────────────────────────────────────────────

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """All readable manifests, or those of one stage, by stage and key."""
        folder = f"{self._root}/manifests" + (f"/{stage}" if stage else "")
        for path in sorted(self._find(folder)):
            folder_name, file_name = path.rsplit("/", 2)[-2:]
            manifest = self.manifest(folder_name, file_name.removesuffix(".json"))
            if manifest is not None:
                yield manifest

    def verify(self) -> list[str]:
        """Read every byte that a manifest names; returns one line per damage found, naming artifact and file."""
        damages = []
        self._verified.clear()
        for manifest in self.manifests():
            for name, file in manifest.files.items():
                try:
                    self._local_blob(file, f"{manifest.ref.uri} file {name}")
                except DamagedArtifact as damage:
                    damages.append(str(damage))
        return damages

    def run_texts(self) -> list[tuple[float, str]]:
        """What `write_text` put under `runs/`: (time of last change, text), newest first."""
        found = []
        for path in self._find(f"{self._root}/runs"):
            found.append((self._fs.modified(path).timestamp(), self._fs.cat_file(path).decode()))
        return sorted(found, reverse=True)

    def remove_unused(self, keep_uris: set[str], older_than: float, dry_run: bool) -> tuple[list[str], int]:
        """Remove artifacts that are not in `keep_uris` and blobs that no artifact names.

        What was written after `older_than` (seconds since the epoch) stays, so that a run in progress loses
        nothing. Returns the URIs of the artifacts removed and the bytes freed.
        """
        kept_blobs: set[str] = set()
        removed = []
        for manifest in list(self.manifests()):
            path = self._manifest_path(manifest.stage, manifest.key)
            if manifest.ref.uri in keep_uris or self._fs.modified(path).timestamp() > older_than:
                kept_blobs.update(file.sha256 for file in manifest.files.values())
            else:
                removed.append(manifest.ref.uri)
                if not dry_run:
                    self._fs.rm_file(path)
        freed = 0
        for path in self._find(f"{self._root}/blobs"):
            if path.rsplit("/", 1)[-1] in kept_blobs or self._fs.modified(path).timestamp() > older_than:
                continue
            freed += self._fs.size(path)
            if not dry_run:
                self._fs.rm_file(path)
        return removed, freed

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────────

    def _manifest_path(self, stage: str, key: str) -> str:
        return f"{self._root}/manifests/{stage}/{key}.json"

    def _blob_path(self, sha256: str) -> str:
        return f"{self._root}/blobs/{sha256[:2]}/{sha256}"

    def _find(self, directory: str) -> list[str]:
        return self._fs.find(directory) if self._fs.exists(directory) else []

    def _blob_is_sound(self, file: StoredFile) -> bool:
        if self.is_local:
            return self._matches(Path(self._blob_path(file.sha256)), file)
        try:
            return self._fs.size(self._blob_path(file.sha256)) == file.size_bytes
        except FileNotFoundError:
            return False

    def _matches(self, path: Path, file: StoredFile) -> bool:
        """Whether a local file has the bytes that were published; remembered while size and mtime stay."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        if status.st_size != file.size_bytes:
            return False
        state = (status.st_size, status.st_mtime_ns)
        if self._verified.get(str(path)) == state:
            return True
        if file_sha256(path) != file.sha256:
            return False
        self._verified[str(path)] = state
        return True

    def _local_blob(self, file: StoredFile, label: str) -> Path:
        path = self.local_dir / "blobs" / file.sha256[:2] / file.sha256
        if not self.is_local and not self._matches(path, file):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            try:
                self._fs.get_file(self._blob_path(file.sha256), str(partial))
            except FileNotFoundError as error:
                raise DamagedArtifact(f"{label} is missing from {self.url}; run again to make it anew") from error
            partial.replace(path)
        if not self._matches(path, file):
            raise DamagedArtifact(f"{label} is missing or damaged ({path}); run again to make it anew")
        return path

    def _store_blob(self, path: Path) -> StoredFile:
        file = StoredFile(file_sha256(path), path.stat().st_size)
        target = self._blob_path(file.sha256)
        if self._blob_is_sound(file):
            return file
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o444)
            path.replace(target)
            status = Path(target).stat()
            self._verified[target] = (status.st_size, status.st_mtime_ns)
        else:
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), target)
        return file

    def _publish_manifest(self, manifest: Manifest) -> ArtifactRef:
        """Write the manifest unless a sound artifact is there; the first of two writers wins."""
        with self._only_publisher(manifest.stage):
            existing = self.find(manifest.stage, manifest.key)
            if existing is None:
                path = self._manifest_path(manifest.stage, manifest.key)
                self._write_atomically(path, manifest.to_text().encode())
        return existing or manifest.ref

    @contextmanager
    def _only_publisher(self, stage: str) -> Iterator[None]:
        """Hold a local store's lock of a stage, which the system releases when its holder dies.

        A remote store has none: of two writers at the same moment the last one's manifest stays.
        """
        if not self.is_local:
            yield
            return
        lock = Path(self._root) / "locks" / stage
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _write_atomically(self, path: str, data: bytes) -> None:
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not self.is_local:
            self._fs.pipe_file(path, data)
            return
        partial = Path(path).with_name(f".{uuid.uuid4().hex[:12]}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _default_cache_dir(url: str) -> Path:
    return Path(tempfile.gettempdir()) / f"lmq-cache-{os.getuid()}" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= _COPY_BELOW_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without links
    shutil.copyfile(source, target)


def _replace_directory(partial: Path, directory: Path) -> None:
    """Put `partial` where `directory` is; a reader sees the old or the new one."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(directory)
