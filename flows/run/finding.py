"""Finding a model, which may mean downloading it, as a task that is tried again when the hub cannot be reached."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed, State

from lmq.errors import InputError, LmqError
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import ModelConfig
from lmq_flows.run.prepare import IdentifiedModel, identify_model
from lmq_tasks.engine import BAD_INPUT, failed_name
from lmq_tasks.retries import UNAVAILABLE, retry_options


def find_model(config: RunConfig, model: ModelConfig) -> IdentifiedModel:
    """Find a model's files in the current flow run. Raises InputError when it is missing or not what was expected."""
    state: State[Any] = _find(config.model_copy(update={"models": (model,)}), return_state=True)
    if state.is_completed():
        return state.result()
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
    try:
        return identify_model(config, config.models[0])
    except InputError as error:
        return Failed(name=failed_name(error), message=str(error))
