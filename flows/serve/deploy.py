"""`lmq deploy` and `lmq serve`: lmq's work pools and deployments on a Prefect server, which may be one of our own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from lmq.errors import InputError, LmqError
from lmq_flows.run.prepare import absolute_store_url

CPU_POOL = "lmq-cpu"
GPU_POOL = "lmq-gpu"
_GPU_SLOTS = 1

_START_WITHIN_S = 180.0
_END_WITHIN_S = 10.0

_QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_PROMPT": "false"}


def prefect_command(*arguments: str) -> list[str]:
    """The command line of Prefect that belongs to this Python."""
    return [sys.executable, "-m", "prefect", *arguments]


def deployments_dir() -> Path:
    """Folder with prefect.yaml and the templates of work pools: of the checkout, or as installed."""
    checkout = Path(__file__).parents[2] / "deployments"
    return checkout if checkout.is_dir() else Path(__file__).parents[1] / "deployments"


def environment_of(api_url: str, store: str, runs_dir: str) -> dict[str, str]:
    """The environment of Prefect's commands: which server, and where the deployed flows keep what they make."""
    places = {"LMQ_STORE": absolute_store_url(store), "LMQ_RUNS": str(Path(runs_dir).absolute())}
    return {**os.environ, **_QUIET, "PREFECT_API_URL": api_url, **places}


def deploy(environment: Mapping[str, str]) -> None:
    """Create or update pools and deployments on the server. Raises LmqError with what Prefect said."""
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        for pool, slots in ((CPU_POOL, None), (GPU_POOL, _GPU_SLOTS)):
            _ensure_pool(client, pool, slots)
    _run(environment, "--no-prompt", "deploy", "--all", "--prefect-file", str(deployments_dir() / "prefect.yaml"))


def _ensure_pool(client: SyncPrefectClient, name: str, slots: int | None) -> None:
    """Create a pool; one that is there stays as it is, of whatever type (process, docker, kubernetes)."""
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=slots))


def _run(environment: Mapping[str, str], *arguments: str) -> None:
    done = subprocess.run(
        prefect_command(*arguments), env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LmqError(f"prefect {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")


# ── a server of our own ──────────────────────────────────────────────────────────────────────────────────


def serve(*, host: str, port: int, store: str, runs_dir: str, runs_at_once: int, console: Console) -> None:
    """Serve until interrupted. Raises InputError for a port in use and LmqError when a part ends by itself."""
    _check_port(host, port)
    api_url = f"http://{host}:{port}/api"
    environment = {**environment_of(api_url, store, runs_dir), "PREFECT_SERVER_API_PORT": str(port)}
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


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port} ({error.strerror}); give another --port") from error


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
