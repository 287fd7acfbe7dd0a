"""Finding the models of a run, and putting those that lie on this machine where workers on others find them.

Finding may mean downloading, so it is a Prefect task that is tried again when the hub cannot be reached.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingResult
from prefect.states import Failed, State

from lmq.errors import InputError, LmqError
from lmq.model.directory import copy_companions
from lmq.model.source import needs_conversion
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import ModelConfig
from lmq_flows.run.prepare import IdentifiedModel, absolute_store_url, identify_model
from lmq_storage import ArtifactRef, ArtifactStore, artifact_key, file_sha256
from lmq_tasks.engine import BAD_INPUT, drop_finished_messages, failed_name
from lmq_tasks.retries import UNAVAILABLE, retry_options
from lmq_tasks.stage import open_store

STAGE = "model-files"
"""Stage name of artifacts that hold a model's files as they are."""


def find_model(config: RunConfig, model: ModelConfig) -> IdentifiedModel:
    """Find a model's files in the current flow run. Raises InputError when it is missing or not what was expected."""
    state: State[Any] = _find(config.model_copy(update={"models": (model,)}), return_state=True)
    if state.is_completed():
        try:
            return state.result()
        except MissingResult:  # the server answered with a state that holds no data
            return identify_model(config, model)
    kind = InputError if state.name in (BAD_INPUT, UNAVAILABLE) else LmqError
    raise kind(state.message or f"{model.name} could not be found")


@task(
    name="find-model",
    task_run_name="find {config.models[0].name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    **retry_options(),
)
def _find(config: RunConfig) -> Any:
    """Find the model, downloading it where it is on the hub, and digest its files."""
    drop_finished_messages()
    try:
        found = identify_model(config, config.models[0])
        get_run_logger().info("find %s: %s", config.models[0].name, found.located.path)
        return found
    except InputError as error:
        return Failed(name=failed_name(error), message=str(error))


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
