"""A Prefect server for all tests, and runs of tiny models on it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.context import _temporary_global_settings_context, get_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from lmq_flows.config.run import RunConfig, parse_run_config
from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.node import Graph, Node
from lmq_flows.graph.walk import execute
from lmq_flows.run.plan import plan_run
from lmq_tasks import STAGES
from tests.flows.prefect_server import SharedServer, database_url, shared_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """A real Prefect server with a database of its own; all workers of pytest share it.

    This process is set to it as by `prefect_test_harness`, which would start one for every worker.
    """
    place = tmp_path_factory.getbasetemp()
    with shared_server((place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "prefect") as server:
        database = {PREFECT_SERVER_DATABASE_CONNECTION_URL: database_url(server.database)}
        with (
            temporary_settings({PREFECT_API_URL: server.url, **database}),
            _temporary_global_settings_context(get_settings_context()),
        ):
            yield server
            APILogWorker.instance().drain()
            EventsWorker.drain_all()


MENU = ["b2g64", "b3g64", "b4g128", "b4g64", "b4g32", "b8g64"]


def tiny_config(model: Path, place: Path, **changes: Any) -> RunConfig:
    """A run that takes seconds: few short sequences, half of the standard menu, every strategy that measures."""
    data: dict[str, Any] = {
        "name": "tiny",
        "models": [{"name": "tiny", "source": str(model)}],
        "strategies": ["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"],
        "budgets": ["uniform b4g64"],
        "measure": {"quantizer": "hqq", "menu": MENU},
        "calibration": {"sequences": 3, "sequence_length": 32},
        "evaluation": {"tokens": 256, "window": 64, "stride": 32},
        "store": str(place / "store"),
        "runs_dir": str(place / "runs"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data.setdefault(section, {})[name] = value
        else:
            data[section] = value
    return parse_run_config(data)


@dataclass(frozen=True)
class Done:
    """A finished run: the state of the flow, (stage, label) → whether it was cached, and what Prefect shows.

    `rows` are the names of the task runs of stages with the names of their states.
    """

    state: Any
    cached: dict[tuple[str, str], bool]
    rows: dict[str, str]

    def ran(self) -> set[str]:
        """Stages of which something ran."""
        return {stage for (stage, _), cached in self.cached.items() if not cached}


def run_and_look(config: RunConfig) -> Done:
    """Run a configuration, note what became of its nodes, and ask the server what became of its tasks."""
    from lmq_flows.run import model
    from lmq_flows.run.quantize import run

    outcomes: dict[Node, Outcome] = {}

    def noted(graph: Graph, **options: Any) -> dict[Node, Outcome]:
        found = execute(graph, **options)
        outcomes.update(found)
        return found

    with mock.patch.object(model, "execute", noted):
        state = run(config)
    tasks = recorded_tasks(state.state_details.flow_run_id)
    return Done(
        state,
        {(node.stage.name, node.label): outcome.state == "cached" for node, outcome in outcomes.items()},
        {task.name: task.state_name for task in tasks if task.name.partition(" ")[0] in STAGES},
    )


def layers_of(row: str) -> set[int]:
    """Layers that a row of the UI is about: `fisher · layers 0-3, 7`."""
    found = re.search(r"layers? ([\d\-, ]+)$", row)
    ranges = [part.split("-") for part in found[1].split(", ")] if found else []
    return {layer for part in ranges for layer in range(int(part[0]), int(part[-1]) + 1)}


def recorded_tasks(flow_run_id: Any) -> list[Any]:
    """Task runs of a flow run, once the server has taken in all of them: it records them a moment later."""
    seen: list[Any] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        tasks = _read_tasks(flow_run_id)
        if len(tasks) == len(seen) and all(task.state is not None and task.state.is_final() for task in tasks):
            return tasks
        seen = tasks
        time.sleep(0.5)
    raise TimeoutError(f"the server did not settle the tasks of flow run {flow_run_id}")


def _read_tasks(flow_run_id: Any) -> list[Any]:
    """Task runs of a run and of the flow runs of its models."""
    parent = FlowRunFilterParentFlowRunId(any_=[flow_run_id])
    tasks: list[Any] = []
    with get_client(sync_client=True) as client:
        of_models = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
        ids = [flow_run_id, *(flow_run.id for flow_run in of_models)]
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids))
        while len(page := client.read_task_runs(flow_run_filter=wanted, limit=200, offset=len(tasks))) == 200:
            tasks += page
    return tasks + page


def promised(config: RunConfig) -> dict[tuple[str, str], bool]:
    """What `lmq plan` says: (stage, label) → cached."""
    plan = plan_run(config)
    assert plan.to_convert == plan.problems == []
    return {(item.node.stage.name, item.node.label): item.cached for item in plan.nodes}
