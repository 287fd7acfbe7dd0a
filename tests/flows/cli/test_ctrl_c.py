"""Signals that reach a command and the Prefect server that it started: Ctrl-C on a terminal, the end of a service."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.prefect_server import SharedServer
from tests.flows.processes import Run, Runner, forking_runner, save_small_llama, wait_until


@pytest.fixture(scope="module")
def runner(server: SharedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Starts commands that have no Prefect server but one of their own."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(server.new_database, home / "prefect.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with forking_runner(PREFECT_HOME=str(home)) as runner:
            yield runner


@pytest.fixture
def run(runner: Runner, tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A command that has done some of its work, in a group of processes of its own."""
    model = save_small_llama(tiny_llama, tmp_path_factory.mktemp("small-llama"), layers=9, width=128)
    made = tmp_path / "store" / "manifests" / "forward"
    run = runner.start("quantize", str(model), "--bits", "4.25", "--effort", "quick", "-o", "small", place=tmp_path)
    try:
        wait_until(lambda: run.is_over or any(made.glob("*.json")), "work that is done", lambda: run.output)
        yield run
    finally:
        run.end_with_its_server()


@pytest.mark.slow
def test_a_run_that_is_stopped_by_ctrl_c_still_has_its_server(run: Run) -> None:
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait() == 1, run.output
    assert run.output.rstrip().endswith("finished work is kept, run again to go on")
    assert "Connection refused" not in run.output
    assert "connection attempts failed" not in run.output


@pytest.mark.slow
def test_a_run_that_is_ended_with_its_server_does_not_wait_for_it(run: Run) -> None:
    os.killpg(run.pid, signal.SIGTERM)
    ended = time.monotonic()
    assert run.wait() == 1, run.output
    assert time.monotonic() - ended < 60, "requests to a server that is gone were tried again and again"
    assert "finished work is kept, run again to go on" in run.output
    assert "Traceback" not in run.output
