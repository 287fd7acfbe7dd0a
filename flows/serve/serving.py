"""`lmq serve`: server, worker and deployments on one machine, without containers; all of it ends together."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import psutil
from rich.console import Console

from lmq.errors import InputError, LmqError
from lmq_flows.serve.deploy import CPU_POOL, deploy, environment_of, prefect_command

_START_WITHIN_S = 180.0
_END_WITHIN_S = 10.0


def serve(*, host: str, port: int, store: str, runs_dir: str, runs_at_once: int, console: Console) -> None:
    """Serve until interrupted. Raises InputError for a port in use and LmqError when a part ends by itself."""
    _check_port(host, port)
    api_url = f"http://{host}:{port}/api"
    environment = {**environment_of(api_url, store, runs_dir), "PREFECT_SERVER_API_PORT": str(port)}
    signal.signal(signal.SIGTERM, _interrupt)
    with _processes() as start:
        console.print("starting the Prefect server", highlight=False)
        server = start(prefect_command("server", "start", "--host", host, "--port", str(port)), environment)
        _wait_until_healthy(f"{api_url}/health", server)
        deploy(environment)
        worker_options = ("--pool", CPU_POOL, "--type", "process", "--limit", str(runs_at_once))
        worker = start(prefect_command("worker", "start", *worker_options), environment)
        console.print(f"Prefect UI: http://{host}:{port}", highlight=False, soft_wrap=True)
        console.print(
            "run a model: prefect deployment run lmq-quantize/on-demand (or its form in the UI)", highlight=False
        )
        console.print("Ctrl-C stops server and worker", highlight=False)
        while all(part.poll() is None for part in (server, worker)):
            time.sleep(0.5)
        ended = "server" if server.poll() is not None else "worker"
        raise LmqError(f"the Prefect {ended} ended by itself; its last words are above")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"{host}:{port} cannot be listened on ({error.strerror}); give another --port") from error


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_WITHIN_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise LmqError(f"the Prefect server did not answer at {url} within {_START_WITHIN_S:.0f} s")


class _Start:
    """Starts processes in sessions of their own, so that Ctrl-C reaches only us and we end them in order."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def __call__(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen(command, env=dict(environment), start_new_session=True))
        return self.started[-1]


@contextmanager
def _processes() -> Iterator[_Start]:
    start = _Start()
    try:
        yield start
    finally:
        for process in reversed(start.started):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: asked first, made to after a while."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_END_WITHIN_S)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=_END_WITHIN_S)
    process.wait()
