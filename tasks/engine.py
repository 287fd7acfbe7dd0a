"""Stages as Prefect tasks: Prefect decides what to skip, by our key, and keeps the state of every task run."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.states import Failed, State

from lmq.errors import InputError, LmqError
from lmq_storage import DamagedArtifact, StoreError
from lmq_tasks.retries import STORE_UNAVAILABLE, UNAVAILABLE, is_transient, retry_options
from lmq_tasks.stage import JsonDict, Site, run_stage

GPU_LIMIT = "lmq-gpu"
"""Prefect concurrency limit that GPU work occupies; `flows` creates it with one slot."""

DAMAGED_INPUT = "DamagedInput"
"""Name of the state of a task whose input turned out to be damaged: the run has to look again."""

BAD_INPUT = "BadInput"
"""Name of the state of a task that cannot work with what the user gave."""


def _given_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"{context.task.name}-{parameters['key']}"


@functools.cache
def stage_task(name: str) -> Task[..., Any]:
    """The Prefect task of a stage: `task(label, key, site, config, inputs)` gives an ArtifactRef as JSON."""
    from lmq_tasks import STAGES

    stage = STAGES[name]

    @task(
        name=name,
        description=(stage.body.__doc__ or "").strip(),
        task_run_name="{label}",
        cache_policy=CacheKeyFnPolicy(cache_key_fn=_given_key),
        persist_result=True,
        result_serializer="json",
        log_prints=False,
        **retry_options(),
    )
    def run(label: str, key: str, site: JsonDict, config: JsonDict, inputs: JsonDict) -> JsonDict | State[Any]:
        try:
            with _gpu_slot(site["device"]):
                return run_stage(stage, key, Site.from_json(site), config, inputs).to_json()
        except DamagedArtifact as error:
            return Failed(name=DAMAGED_INPUT, message=str(error))
        except Exception as error:  # noqa: BLE001 - a run's results name a cause, whatever a stage raises
            if not is_transient(error) and not isinstance(error, LmqError | StoreError):
                get_run_logger().exception("%s ended with an error that lmq does not expect", label)
                return Failed(name=failed_name(error), message=f"{label}: {_unexpected(error)}")
            return Failed(name=failed_name(error), message=f"{label}: {error}")

    return run


def _unexpected(error: Exception) -> str:
    """Cause and next step of an error that is no message to a user."""
    cause = str(error).strip().partition("\n")[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__} ({cause or 'without a message'}) at {Path(where.filename).name}:{where.lineno}, "
        "which lmq does not expect. Run again: finished work is kept. If it comes again, report it with the task log, "
        "which holds the traceback, and leave out what leads to it (the strategy, or the model)"
    )


def failed_name(error: Exception) -> str:
    """Name of the state of a task that ended with this error; it says whether trying again can help."""
    if is_transient(error):
        return STORE_UNAVAILABLE if isinstance(error, StoreError) else UNAVAILABLE
    return BAD_INPUT if isinstance(error, InputError) else "Failed"


@contextmanager
def _gpu_slot(device: str) -> Iterator[None]:
    """Hold the GPU alone while working on it; nothing to hold on a CPU."""
    if not device.startswith("cuda"):
        yield
        return
    with concurrency(GPU_LIMIT, occupy=1, strict=True):
        yield
