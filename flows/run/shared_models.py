"""Models that lie on this machine, put into the store for workers on other machines."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from lmq.model.directory import copy_companions
from lmq.model.source import needs_conversion
from lmq_flows.config.run import RunConfig
from lmq_flows.run.prepare import IdentifiedModel, absolute_store_url
from lmq_storage import ArtifactRef, ArtifactStore, artifact_key, file_sha256
from lmq_tasks.stage import open_store

STAGE = "model-files"
"""Stage name of artifacts that hold a model's files as they are."""


def share_models(config: RunConfig, models: list[IdentifiedModel]) -> list[IdentifiedModel]:
    """The models as the workers of the run find them, with directories of this machine put into a remote store.

    Nothing is done for the hub's models, which every machine fetches, for files that are converted into the store
    anyway, for workers of this machine, and for a store that is a directory: who shares that can share the model too.
    """
    store = open_store(absolute_store_url(config.store))
    if config.runner.address is None or store.is_local:
        return models
    of_this_machine = [m for m in models if m.located.kind != "hub" and not needs_conversion(m.located)]
    return [replace(m, shared=_put(store, m)) if m in of_this_machine else m for m in models]


def _put(store: ArtifactStore, model: IdentifiedModel) -> ArtifactRef:
    """Publish the files that make the model's identity, and those that a checkpoint takes over as they are.

    The key is the digest of all of them, so that it is done once.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_companions(model.located.path, Path(folder))
        companions = {path.name: path for path in sorted(Path(folder).iterdir())}
        digests = {name: file_sha256(path) for name, path in companions.items()}
        config = {"weights_sha256": model.sha256, "companions": digests}
        key = artifact_key(STAGE, 1, config, {})
        return store.find(STAGE, key) or store.publish(
            stage=STAGE,
            key=key,
            schema="model/1",
            files={**companions, **{path.name: path for path in model.located.files}},
            algorithm_version=1,
            config=config,
        )
