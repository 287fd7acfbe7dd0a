"""The same runs with Prefect's server on Debian's PostgreSQL."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterParentFlowRunId

from tests.deployments.conftest import free_port, lmq_run, prefect_server, running, wait_for
from tests.flows.conftest import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROGRAMS = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """Connection URL of a database of its own; PostgreSQL refuses to run as root, so root lends it to `nobody`."""
    if not PROGRAMS.is_dir():
        pytest.skip(f"PostgreSQL is not at {PROGRAMS}; on Debian: apt-get install postgresql")
    place = Path("/tmp") / f"lmq-postgres-{os.getpid()}"
    place.mkdir(mode=0o700)
    options: dict[str, Any] = {}
    if getpass.getuser() == "root":
        shutil.chown(place, "nobody")
        options["user"] = "nobody"
    port = free_port()
    environment = {**os.environ, "PGPORT": str(port), "PGHOST": "127.0.0.1", "PGUSER": "prefect"}
    try:
        initdb = [
            PROGRAMS / "initdb",
            "-D",
            place / "data",
            "-U",
            "prefect",
            "--auth",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **options)
        command = [str(PROGRAMS / "postgres"), "-D", str(place / "data"), "-p", str(port), "-k", str(place)]
        with running(
            [*command, "-c", "fsync=off"], environment, tmp_path / "postgres.log", cwd="/", **options
        ) as process:
            ready = [PROGRAMS / "pg_isready", "-q", "-d", "postgres"]
            wait_for(lambda: subprocess.run(ready, env=environment, check=False).returncode == 0 or process.poll(), 60)
            subprocess.run([PROGRAMS / "createdb", "prefect"], env=environment, check=True)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        shutil.rmtree(place)


def test_a_run_on_postgresql_and_its_repetition_from_the_cache(database: str, tiny_llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama, tmp_path, strategies=["uniform", "loss-aware"])
    with prefect_server(tmp_path, PREFECT_API_DATABASE_CONNECTION_URL=database) as server:
        for _ in range(2):
            with running(lmq_run(config, tmp_path), server.environment, tmp_path / "log") as process:
                assert process.wait(timeout=400) == 0, (tmp_path / "log").read_text()
        title = FlowRunFilterName(any_=["sweep tiny: 1 model × 2 strategies × 1 budget"])

        def settled() -> bool:
            """Both runs are complete, and of the second only the task that finds the model was not Cached."""
            with server.client() as client:
                runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=title))
                second = max(runs, key=lambda run: run.created)
                parent = FlowRunFilterParentFlowRunId(any_=[second.id])
                tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent), limit=200)
            done = [run.state.name for run in runs] == ["Completed", "Completed"]
            return done and len(tasks) > 10 and {t.name for t in tasks if t.state_name != "Cached"} == {"find tiny"}

        wait_for(settled, 120)  # the server takes in the states of tasks a moment later
    with_sqlite = list((tmp_path / "prefect").glob("*.db"))
    assert with_sqlite == []
