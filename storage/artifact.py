"""What the store knows of an artifact: a small reference to pass around, and the manifest beside the bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lmq_storage.errors import DamagedArtifact, StoreError
from lmq_storage.keys import canonical_json, text_sha256
from lmq_storage.names import checked_file_name, checked_name, is_sha256

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ArtifactRef:
    """Reference to a published artifact: `stage/key` in any store, the digest of its content, its schema."""

    uri: str
    sha256: str
    schema: str

    @property
    def stage(self) -> str:
        """Stage that made the artifact."""
        return self.uri.split("/", 1)[0]

    @property
    def key(self) -> str:
        """Key under which it was published."""
        return self.uri.split("/", 1)[1]

    def to_json(self) -> dict[str, str]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> ArtifactRef:
        """Inverse of `to_json`. Raises DamagedArtifact for anything else."""
        try:
            ref = cls(**data)
            checked_name(ref.stage), checked_name(ref.key)
        except (TypeError, IndexError, AttributeError, StoreError) as error:
            raise DamagedArtifact(f"not a reference to an artifact: {error}") from error
        return ref


@dataclass(frozen=True)
class StoredFile:
    """One file of an artifact: where its bytes lie is given by `sha256` alone."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not is_sha256(self.sha256) or not isinstance(self.size_bytes, int) or self.size_bytes < 0:
            raise ValueError(f"not a digest and a size: {self.sha256!r}, {self.size_bytes!r}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about one artifact but its bytes: what it holds, and what it was made from."""

    stage: str
    key: str
    schema: str
    files: Mapping[str, StoredFile]
    algorithm_version: int
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    manifest_version: int = MANIFEST_VERSION

    @property
    def content_sha256(self) -> str:
        """Digest of the files' names and bytes; independent of how and when they were made."""
        return text_sha256(canonical_json({name: file.sha256 for name, file in self.files.items()}))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def ref(self) -> ArtifactRef:
        """The reference to pass to other stages."""
        return ArtifactRef(f"{self.stage}/{self.key}", self.content_sha256, self.schema)

    def to_text(self) -> str:
        """JSON text as stored."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Inverse of `to_text`.

        Raises OtherVersion for a manifest of another version, and DamagedArtifact when the text is no manifest or holds
        names that lead out of the store.
        """
        try:
            data = json.loads(text)
            version = data["manifest_version"]
            if version != MANIFEST_VERSION:
                raise OtherVersion(f"manifest version {version}, this lmq reads version {MANIFEST_VERSION}")
            files = {checked_file_name(name): StoredFile(**item) for name, item in data.pop("files").items()}
            manifest = cls(files=files, **data)
            checked_name(manifest.stage), checked_name(manifest.key)
        except OtherVersion:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, StoreError) as error:
            raise DamagedArtifact(f"not a manifest: {error}") from error
        return manifest


class OtherVersion(DamagedArtifact):
    """A manifest that another version of lmq wrote: to this one the artifact is not there."""
