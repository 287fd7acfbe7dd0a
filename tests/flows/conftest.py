"""A Prefect server for the whole session, and runs of tiny models on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.testing.utilities import prefect_test_harness

from lmq_flows.config.run import RunConfig, parse_run_config
from lmq_flows.run.plan import plan_run
from lmq_tasks import STAGES


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """A real Prefect server with a database of its own."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


def tiny_config(model: Path, place: Path, **changes: Any) -> RunConfig:
    """A run that takes seconds: few short sequences, every strategy that measures something."""
    data: dict[str, Any] = {
        "name": "tiny",
        "models": [{"name": "tiny", "source": str(model)}],
        "strategies": ["uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"],
        "budgets": ["uniform b4g64"],
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
    """A finished run: the state of the flow, and (stage, label) → whether Prefect shows the task as Cached."""

    state: Any
    cached: dict[tuple[str, str], bool]

    def ran(self) -> set[str]:
        """Stages of which something ran."""
        return {stage for (stage, _), cached in self.cached.items() if not cached}


def run_and_look(config: RunConfig) -> Done:
    """Run a configuration and ask the server what became of its tasks."""
    from lmq_flows.run.quantize import run

    state = run(config)
    cached = {}
    for task in recorded_tasks(state.state_details.flow_run_id):
        stage, _, label = task.name.partition(" ")
        if stage in STAGES:
            cached[stage, label] = task.state_name == "Cached"
    return Done(state, cached)


def recorded_tasks(flow_run_id: Any) -> list[Any]:
    """Task runs of a flow run, once the server has taken in all of them: it records them a moment later."""
    seen: list[Any] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        tasks = _read_tasks(flow_run_id)
        if len(tasks) == len(seen) and all(task.state is not None and task.state.is_final() for task in tasks):
            return tasks
        seen = tasks
        time.sleep(1.0)
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
