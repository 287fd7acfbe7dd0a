"""Artifact store: content-addressed, atomic, verified, on any fsspec URL."""

from lmq_storage.artifact import ArtifactRef, Manifest, StoredFile
from lmq_storage.checked_files import file_sha256
from lmq_storage.errors import BadStore, DamagedArtifact, StoreError
from lmq_storage.keys import artifact_key, canonical_json, text_sha256
from lmq_storage.store import ArtifactStore

__all__ = [
    "ArtifactRef",
    "ArtifactStore",
    "BadStore",
    "DamagedArtifact",
    "Manifest",
    "StoreError",
    "StoredFile",
    "artifact_key",
    "canonical_json",
    "file_sha256",
    "text_sha256",
]
