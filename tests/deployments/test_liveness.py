"""`lmq run` against a server: killed, taken over by the next run; cancelled in the UI in mid native work."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterParentFlowRunId
from prefect.states import Cancelling

from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.deployments.conftest import Server, lmq_run, running, wait_for
from tests.flows.conftest import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def runs_named(server: Server, name: str) -> list[Any]:
    with server.client() as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    return sorted(found, key=lambda run: run.created)


def in_native_work(server: Server, stage: str) -> bool:
    with server.client() as client:
        return any(
            task.state_name == "Running" and task.name.startswith(f"{stage} ")
            for task in client.read_task_runs(limit=200)
        )


def test_a_killed_run_is_marked_crashed_and_taken_over_by_the_next(prefect, wide, tmp_path):
    config = tiny_config(wide, tmp_path, name="killed", models=[{"name": "killed", "source": str(wide)}],
                         strategies=["uniform"], measure__menu=["b4g64", "b3g64"])  # fmt: skip
    title = "quantize killed uniform uniform b4g64"
    command = lmq_run(config, tmp_path)
    with running(command, prefect.environment, tmp_path / "log") as process:
        wait_for(lambda: list((tmp_path / "store" / "manifests").glob("discover/*.json")) or process.poll(), 300)
        wait_for(lambda: in_native_work(prefect, "grids") or process.poll() is not None, 300)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    (killed,) = runs_named(prefect, title)
    assert killed.state.name == "Running"
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "manifests").rglob("*.json")}
    assert finished
    with running(command, prefect.environment, tmp_path / "log") as process:
        assert process.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    killed, second = runs_named(prefect, title)
    assert (killed.state.name, second.state.name) == ("Crashed", "Completed")
    assert "is gone; finished work is kept" in killed.state.message
    with prefect.client() as client:
        parent = FlowRunFilterParentFlowRunId(any_=[killed.id])
        of_models = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    assert [run.state.name for run in of_models] == ["Crashed"]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was repeated"


def test_cancelling_in_the_ui_ends_native_work_of_a_run_from_a_terminal(prefect, wide, tmp_path):
    config = tiny_config(wide, tmp_path, name="ended", models=[{"name": "ended", "source": str(wide)}],
                         strategies=["uniform"], budgets=["uniform b3g64"])  # fmt: skip
    with running(lmq_run(config, tmp_path), prefect.environment, tmp_path / "log") as process:
        wait_for(lambda: in_native_work(prefect, "grids") or process.poll() is not None, 300)
        (run,) = runs_named(prefect, "quantize ended uniform uniform b3g64")
        asked_s = time.monotonic()
        with prefect.client() as client:
            client.set_flow_run_state(run.id, Cancelling())
        assert process.wait(timeout=60) == 1, (tmp_path / "log").read_text()
        sys.stdout.write(f"ended {time.monotonic() - asked_s:.1f} s after cancelling\n")
    said = (tmp_path / "log").read_text()
    assert "lmq: cancelled in the Prefect UI; finished work is kept, run again to go on" in said
    (run,) = runs_named(prefect, run.name)
    assert run.state.name == "Cancelled"
    store = ArtifactStore(config.store)
    assert verify(store) == []
    assert not list(store.manifests("grids"))
