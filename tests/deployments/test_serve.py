"""`lmq serve` on one machine: everything is there, and Ctrl-C leaves nothing."""

from __future__ import annotations

import signal
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.deployments.conftest import Server, free_port, is_running, running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_worker_and_deployments_start_and_end_together(tmp_path: Path, number: signal.Signals) -> None:
    server = Server(free_port(), tmp_path)
    command = [sys.executable, "-m", "lmq_flows.cli", "serve", "--port", str(server.port)]
    log = tmp_path / "log"
    with running(command, server.environment, log, cwd=tmp_path) as process:
        wait_for(lambda: f"Prefect UI: {server.address}" in log.read_text() or process.poll() is not None, 400)
        assert process.poll() is None, log.read_text()
        with urllib.request.urlopen(server.address, timeout=30) as page:
            assert b"Prefect" in page.read()
        with server.client() as client:
            assert {item.name for item in client.read_deployments()} == {
                "nightly",
                "on-demand",
                "on-demand-gpu",
                "watch",
            }
            wait_for(lambda: client.read_workers_for_work_pool("lmq-cpu"), 120)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 2
        process.send_signal(number)
        assert process.wait(timeout=60) == 0, log.read_text()
        assert not [pid for pid in family if is_running(pid)]
    assert "Traceback" not in log.read_text()


def test_a_port_in_use_is_refused(prefect: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmq_flows.cli", "serve", "--port", str(prefect.port)]
    with running(command, prefect.environment, tmp_path / "log", cwd=tmp_path) as process:
        assert process.wait(timeout=400) == 2
    assert "give another --port" in (tmp_path / "log").read_text()
