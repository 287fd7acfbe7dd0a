"""A flow, a server and a schedule of Prefect's, in the smallest form that shows whether the installed versions work.

    python -m benchmarks.pins.probe

Starts a server in a temporary folder, runs a flow whose second task is cached, serves that flow every 30 seconds and
waits until the server has scheduled a run that ends well. Prints the logs; the last line says `works`, or what went
wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import INPUTS
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

_START_S = 300
_SCHEDULE_S = 120
_RUN_S = 240


@task(cache_policy=INPUTS, persist_result=True)
def double(number: int) -> int:
    """What is cached."""
    return 2 * number


@flow
def twice() -> list[str]:
    """Names of the states that the same task ends in, twice."""
    return [double(21, return_state=True).name for _ in range(2)]


def serve() -> None:
    """Run the flow, then serve it until this process is killed. Raises RuntimeError where the cache was not used."""
    if (states := twice()) != ["Completed", "Cached"]:
        raise RuntimeError(f"the same task twice ended as {states}, not as Completed and Cached")
    twice.serve(name="probe", interval=30, limit=1, print_starting_message=False)


def probe() -> None:
    """Raises SystemExit with what went wrong."""
    with tempfile.TemporaryDirectory(prefix="probe-", ignore_cleanup_errors=True) as home:
        port = _free_port()
        address = f"http://127.0.0.1:{port}/api"
        os.environ.update(PREFECT_HOME=home, PREFECT_API_URL=address, PREFECT_SERVER_ANALYTICS_ENABLED="false")
        started = [_Process(Path(home) / "server.log", "-m", "prefect", "server", "start", "--port", str(port))]
        try:
            started[0].wait_for(lambda: _answers(f"{address}/health"), _START_S, "the server does not answer")
            started.append(_Process(Path(home) / "serve.log", __file__, "serve"))
            with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
                served = started[1].wait_for
                served(client.read_deployments, _START_S, "the flow is not served")
                served(
                    lambda: any(run.auto_scheduled for run in client.read_flow_runs()),
                    _SCHEDULE_S,
                    "the server schedules no run of a served flow",
                )
                served(
                    lambda: any(
                        run.auto_scheduled and run.state and run.state.is_completed() for run in client.read_flow_runs()
                    ),
                    _RUN_S,
                    "no scheduled run ends well",
                )
        finally:
            for process in reversed(started):
                process.kill()
                print(process.log.read_text(), flush=True)


class _Process:
    """A Python of this environment in a session of its own, which is killed as a whole."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, ready: Callable[[], object], seconds: float, otherwise: str) -> None:
        """Raises SystemExit with the last error of the log if it ends, with `otherwise` if it takes longer."""
        end = time.monotonic() + seconds
        while not ready():
            if self._process.poll() is not None:
                lines = self.log.read_text().strip().splitlines()
                sys.exit(next((line for line in reversed(lines) if "Error" in line), "\n".join(lines[-1:])))
            if time.monotonic() > end:
                sys.exit(f"{otherwise} within {seconds:.0f} s")
            time.sleep(1)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        probe()
        print("works")
