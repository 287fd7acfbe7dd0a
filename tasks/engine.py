"""Stages as Prefect tasks: each task carries nodes of one stage, and its state says what became of them.

Whether a node is there already is asked of the store, by our key. Prefect keeps no cache of its own: a second list of
what is finished could contradict the store, and would have to be guarded against what others write into it.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.runtime import task_run
from prefect.states import Completed, Failed, State

from lmq.errors import InputError, LmqError
from lmq_storage import ArtifactRef, DamagedArtifact, StoreError
from lmq_tasks.chunk import Tell, run_items
from lmq_tasks.process_memory import give_back_freed_memory
from lmq_tasks.retries import STORE_UNAVAILABLE, UNAVAILABLE, is_transient, retry_options
from lmq_tasks.stage import JsonDict, Site, Stage, open_store, run_stage, stage_key

GPU_LIMIT = "lmq-gpu"
"""Prefect concurrency limit that GPU work occupies; `flows` creates it with one slot."""

DAMAGED_INPUT = "DamagedInput"
"""Name of the state of a task whose input turned out to be damaged: the run has to look again."""

BAD_INPUT = "BadInput"
"""Name of the state of a task that cannot work with what the user gave."""

CACHED = "Cached"
"""Name of the state of a task whose nodes were all there already: Prefect's own word, with its own colour in the UI."""

_MOST_TELLING = (UNAVAILABLE, STORE_UNAVAILABLE, DAMAGED_INPUT)
"""Names of failures that the state of a whole task takes before others: what is tried again, what ends a walk."""


@functools.cache
def stage_task(name: str) -> Task[..., State[Any]]:
    """The Prefect task of a stage: `task(label, items, total, tell)`; its state holds the outcomes of the items.

    `items` are those of `run_items`, or `{label, site, ref}` for what is there already; `total` is how many such nodes
    the run has, to say "15 of 30 layers". `tell` is for runners of this process.
    """
    from lmq_tasks import STAGES

    @task(
        name=name,
        description=(STAGES[name].body.__doc__ or "").strip(),
        task_run_name="{label}",
        cache_policy=NO_CACHE,
        persist_result=False,
        log_prints=False,
        **retry_options(),
    )
    def run(label: str, items: list[JsonDict], total: int, tell: Tell | None = None) -> State[Any]:
        drop_finished_messages()
        stage, started = STAGES[name], time.perf_counter()
        if all("ref" in item for item in items):
            outcomes = [{"state": "cached", "ref": item["ref"]} for item in items]
        else:
            again = (task_run.run_count or 1) > 1
            outcomes = run_items(items, lambda item: _outcome(stage, item, again=again), tell)
            give_back_freed_memory()
        state = _state(stage, items, outcomes, total, time.perf_counter() - started)
        if state.is_completed():
            get_run_logger().info("%s: %s", label, state.message)
        return state

    return run


def _outcome(stage: Stage, item: JsonDict, *, again: bool) -> JsonDict:
    """What becomes of one node: `{state, ref}` and the seconds it took, or `{state, message}`.

    `again`: what is there was made by an earlier attempt of the same task.
    """
    label = f"{stage.name} {item['label']}"
    started = time.perf_counter()
    try:
        site = Site.from_json(item["site"])
        store = open_store(site.store_url)
        key = stage_key(store, stage, item["config"], item["inputs"])
        if (found := store.find(stage.name, key)) is not None:
            return {"state": "ran" if again else "cached", "ref": found.to_json()}
        with _gpu_slot(site.device):
            made = run_stage(stage, key, site, item["config"], item["inputs"])
        return {"state": "ran", "ref": made.to_json(), "seconds": time.perf_counter() - started}
    except DamagedArtifact as error:
        return {"state": DAMAGED_INPUT, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - a run's results name a cause, whatever a stage raises
        if not is_transient(error) and not isinstance(error, LmqError | StoreError):
            get_run_logger().exception("%s ended with an error that lmq does not expect", label)
            return {"state": failed_name(error), "message": f"{label}: {_unexpected(error)}"}
        return {"state": failed_name(error), "message": f"{label}: {error}"}


def _unexpected(error: Exception) -> str:
    """Cause and next step of an error that is not a message to a user."""
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


# ── what a task's state says ─────────────────────────────────────────────────────────────────────────────


def _state(stage: Stage, items: Sequence[JsonDict], outcomes: list[JsonDict], total: int, seconds: float) -> State[Any]:
    """State of a task: Cached, Completed, or Failed under the name of its most telling failure."""
    failed = [outcome for outcome in outcomes if "ref" not in outcome]
    if failed:
        worst = next((one for name in _MOST_TELLING for one in failed if one["state"] == name), failed[0])
        share = f"{len(failed)} of {len(outcomes)} failed: " if len(outcomes) > 1 else ""
        return Failed(name=worst["state"], message=share + worst["message"], data=outcomes)
    cached = sum(outcome["state"] == "cached" for outcome in outcomes)
    name = CACHED if cached == len(outcomes) else None
    if total > 1:
        message = _counted(len(outcomes) - cached, cached, total, seconds)
    else:
        message = ", ".join([*_said(stage, items[0], outcomes[0]), "cached" if cached else f"in {seconds:.1f} s"])
    return Completed(name=name, message=message, data=outcomes)


def _counted(made: int, cached: int, total: int, seconds: float) -> str:
    """`30 of 30 layers cached`, or `12 of 30 layers in 3.4 s`."""
    counted = [f"{made} of {total} layers in {seconds:.1f} s"] if made else []
    return ", ".join([*counted, f"{cached} of {total} layers cached"] if cached else counted)


def _said(stage: Stage, item: JsonDict, outcome: JsonDict) -> list[str]:
    """What the stage has to say of what it made: `perplexity 14.04`."""
    if stage.result is None:
        return []
    store = open_store(item["site"]["store_url"])
    ref = ArtifactRef.from_json(outcome["ref"])
    try:
        return [stage.result(lambda file: store.path(ref, file))]
    except DamagedArtifact:
        return []  # whoever needs it will say so


def drop_finished_messages() -> None:
    """Let the log of a run say what was made, without Prefect's "Finished in state Completed()" after each line."""
    logger = logging.getLogger("prefect.task_runs")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.levelno == logging.INFO and str(record.msg).startswith("Finished in state "))


@contextmanager
def _gpu_slot(device: str) -> Iterator[None]:
    """Hold the GPU alone while working on it; nothing to hold on a CPU."""
    if not device.startswith("cuda"):
        yield
        return
    with concurrency(GPU_LIMIT, occupy=1, strict=True):
        yield
