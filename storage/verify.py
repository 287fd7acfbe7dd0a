"""Reading a whole store to find damaged bytes."""

from __future__ import annotations

from lmq_storage.artifact import OtherVersion
from lmq_storage.errors import DamagedArtifact
from lmq_storage.store import ArtifactStore, blob_path


def verify(store: ArtifactStore) -> list[str]:
    """Read every byte that a manifest names, in the storage itself; one line per damage, naming artifact and file."""
    store.checked.clear()
    damages = []
    states: dict[str, str | None] = {}
    for stage, key in store.manifest_keys():
        try:
            manifest = store.read_manifest(stage, key)
        except FileNotFoundError:
            continue  # removed since it was listed
        except OtherVersion as other:
            damages.append(f"{stage}/{key} cannot be used: {other}; it will be made again, and gc removes it")
            continue
        except DamagedArtifact as damage:
            damages.append(f"{stage}/{key} has a damaged manifest ({damage}); it will be made again")
            continue
        for name, file in manifest.files.items():
            if file.sha256 not in states:
                states[file.sha256] = _damage(store, file.sha256, file.size_bytes)
            if states[file.sha256] is not None:
                store.distrust(file.sha256)
                damages.append(f"{stage}/{key} file {name} {states[file.sha256]}; run again to make it anew")
    return damages


def _damage(store: ArtifactStore, sha256: str, size_bytes: int) -> str | None:
    """What is wrong with bytes of the store, in words."""
    try:
        found = store.storage.sha256(blob_path(sha256))
    except FileNotFoundError:
        return "is missing"
    if found == sha256:
        return None
    size = store.storage.size(blob_path(sha256))
    return "has other bytes than were published" if size == size_bytes else f"has {size} bytes, not {size_bytes}"
