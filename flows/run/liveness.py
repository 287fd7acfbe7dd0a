"""What ties a run to the process that works on it: signs of life on the Prefect server, and its lease in the store.

A process that is killed cannot tell the server, where its run stays Running for ever. So every run notes which process
works on it and, now and then, that it lives; the next run marks those whose process is gone as Crashed. Their finished
work is in the store, which keeps whatever a run in progress uses: the run holds a lease there until it ends.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException
from prefect.states import Cancelled, Crashed, State

from lmq_flows.graph.direct import Outcome, Watcher
from lmq_flows.graph.node import Node
from lmq_flows.run.prepare import absolute_store_url
from lmq_storage.leases import Lease
from lmq_storage.processes import counts_as_alive, process_token
from lmq_tasks.stage import open_store

PROCESS = "lmq.process"
HOST = "lmq.host"
ALIVE_AT = "lmq.alive-at"
"""Labels of a flow run: the process that works on it, its machine, and when it last said that it lives."""

_LOOK_EVERY_S = 3.0
_BEAT_EVERY_S = 30.0
_UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
_SERVER_TROUBLE = (httpx.HTTPError, PrefectException, OSError)

_held: ContextVar[Lease | None] = ContextVar("lease", default=None)


@contextmanager
def signs_of_life(flow_run_id: UUID, workspaces: Path) -> Iterator[None]:
    """Say while the block runs that this process works on the flow run, and end it when the run is cancelled.

    A worker ends the processes of its runs itself; then nothing is done about cancelling here. `workspaces` is where
    stages write files before they are published; what an ended process left there is removed.
    """
    stop = threading.Event()
    end = None if os.environ.get("PREFECT__FLOW_RUN_ID") else lambda: _end_cancelled(flow_run_id, workspaces)
    with get_client(sync_client=True) as client:
        _say_alive(client, flow_run_id)
    context = contextvars.copy_context()  # which server: the settings of this thread
    watcher = threading.Thread(
        target=context.run, args=(_watch, flow_run_id, stop, end), name="lmq signs of life", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=2 * _LOOK_EVERY_S)  # it may be waiting for a server that is away


def mark_cut_off(own: UUID) -> list[str]:
    """Mark the runs whose process is gone as Crashed, or Cancelled where that was asked; returns their names."""
    with get_client(sync_client=True) as client:
        cut_off = [run for run in _unfinished_runs(client) if run.id != own and _is_cut_off(run)]
        for run in cut_off:
            message = f"its process on {run.labels[HOST]} is gone; finished work is kept, the next run goes on from it"
            cancelled = run.state.type == StateType.CANCELLING
            end_flow_run(client, run.id, Cancelled(message=message) if cancelled else Crashed(message=message))
    return [run.name for run in cut_off]


def end_flow_run(client: SyncPrefectClient, flow_run_id: UUID, state: State[Any]) -> None:
    """Put a flow run and what is unfinished below it into a final state."""
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))
    parent = FlowRunFilterParentFlowRunId(any_=[flow_run_id])
    for below in client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent, state=states)):
        end_flow_run(client, below.id, state)
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, _copy(state), force=True)
    client.set_flow_run_state(flow_run_id, _copy(state), force=True)


def _copy(state: State[Any]) -> State[Any]:
    """A state of its own: the server takes no identifier twice."""
    return State(type=state.type, name=state.name, message=state.message)


def _unfinished_runs(client: SyncPrefectClient) -> list[Any]:
    found = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(like_="lmq")),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))),
    )
    return [run for run in found if PROCESS in run.labels]


def _is_cut_off(run: Any) -> bool:
    return not counts_as_alive(str(run.labels[PROCESS]), time.time() - float(run.labels.get(ALIVE_AT, 0)))


def _say_alive(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    labels: dict[str, Any] = {PROCESS: process_token(), HOST: platform.node(), ALIVE_AT: time.time()}
    client.update_flow_run_labels(flow_run_id, labels)


def _watch(flow_run_id: UUID, stop: threading.Event, end: Callable[[], None] | None) -> None:
    """Look whether the run was cancelled, and say that it lives; a server that is away is waited for."""
    next_beat = time.monotonic() + _BEAT_EVERY_S
    with get_client(sync_client=True) as client:
        while not stop.wait(_LOOK_EVERY_S):
            with contextlib.suppress(*_SERVER_TROUBLE):
                if time.monotonic() >= next_beat:
                    _say_alive(client, flow_run_id)
                    next_beat = time.monotonic() + _BEAT_EVERY_S
                state = client.read_flow_run(flow_run_id).state
                if end is not None and state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                    end()


def _end_cancelled(flow_run_id: UUID, workspaces: Path) -> None:
    """End this process in mid work: native code in other threads hears of nothing else."""
    message = "cancelled in the Prefect UI; finished work is kept, run again to go on"
    with contextlib.suppress(*_SERVER_TROUBLE), get_client(sync_client=True) as client:
        end_flow_run(client, flow_run_id, Cancelled(message=message))
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which progress bars hide
    sys.stderr.write(f"\nlmq: {message}\n")
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    for left in workspaces.glob(f"{process_token()}-*"):
        shutil.rmtree(left, ignore_errors=True)
    os._exit(1)


@contextmanager
def run_lease(store_url: str, name: str) -> Iterator[Lease]:
    """The lease that an outer flow holds, else one of our own until the block ends."""
    outer = _held.get()
    if outer is not None:
        yield outer
        return
    with Lease(open_store(absolute_store_url(store_url)), name) as lease:
        token = _held.set(lease)
        try:
            yield lease
        finally:
            _held.reset(token)


def keeping(lease: Lease, watch: Watcher) -> Watcher:
    """A watcher that notes every artifact in the lease. What was there already: before it is read."""

    def note(node: Node, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.ref is not None:
            lease.use([outcome.ref.uri], at_once=outcome.state == "cached")
        watch(node, outcome)

    return note
