"""The Prefect server is killed in mid run and started again on the same database and address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.flows.processes import content, finished_work, forking_runner, wait_until, write_config


@contextmanager
def serving(home, port):
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: _answers(port), "the server to answer", (home / "server.log").read_text)
            yield server
        finally:
            if server.poll() is None:
                os.killpg(server.pid, 9)
            server.wait()


def _answers(port):
    time.sleep(0.2)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_server_that_is_killed_and_started_again_costs_at_most_another_start(model, whole, tmp_path, note):
    """Whether the run itself gets over it depends on what it was telling the server; its work stays in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = write_config(model, tmp_path, "whole")
    with forking_runner(PREFECT_API_URL=f"http://127.0.0.1:{port}/api", PREFECT_HOME=str(tmp_path)) as runner:
        with serving(tmp_path, port):
            run = runner.run(config)
            wait_until(
                lambda: run.is_over or len(finished_work(tmp_path / "store")) >= 10, "10 artifacts", lambda: run.output
            )
            assert not run.is_over, run.output
            there = finished_work(tmp_path / "store")
        with serving(tmp_path, port):
            code = run.wait()
            assert verify(ArtifactStore(str(tmp_path / "store"))) == []
            if code != 0:
                runner.run(config).finish()
    assert {path: path.stat().st_mtime_ns for path in there} == there, "finished work was repeated"
    assert content(tmp_path / "runs" / "whole") == whole["content"]
    ended = "went on to its end" if code == 0 else "ended with a message and was started again"
    note(f"killed with {len(there)} of {whole['artifacts']} artifacts there, 0 lost or made again; the run {ended}")
