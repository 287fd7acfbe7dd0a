"""Real servers, workers and processes: minutes of work, not part of the default suite (`pytest tests/deployments`)."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmq_flows.config.run import RunConfig
from lmq_flows.serve.deploy import deploy, environment_of, prefect_command


@dataclass(frozen=True)
class Server:
    """A Prefect server in a process of its own."""

    port: int
    home: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to talk to it."""
        env = environment_of(f"{self.address}/api", str(self.home / "store"), str(self.home / "runs"))
        return {**env, "PREFECT_HOME": str(self.home / "prefect")}

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: f"{self.address}/api"}), get_client(sync_client=True) as client:
            yield client

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Prefect's against it."""
        return subprocess.run(
            prefect_command(*arguments), env=self.environment, capture_output=True, text=True, check=False, timeout=500
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process while the block runs; it and all that it started are killed afterwards."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            process.send_signal(signal.SIGTERM)
            for left in psutil.wait_procs(family, timeout=15)[1]:
                left.kill()
        process.wait()


@contextmanager
def prefect_server(home: Path, **settings: str) -> Iterator[Server]:
    """A server on a free port, on SQLite unless the settings name another database."""
    server = Server(free_port(), home)
    environment = {**server.environment, "PREFECT_SERVER_API_PORT": str(server.port), **settings}
    command = prefect_command("server", "start", "--host", "127.0.0.1", "--port", str(server.port))
    with running(command, environment, home / "server.log") as process:
        wait_for(lambda: healthy(server) or process.poll() is not None, 240)
        assert process.poll() is None, (home / "server.log").read_text()
        yield server


def healthy(server: Server) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{server.address}/api/health", timeout=5):
        return True
    return False


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise TimeoutError(f"nothing came of waiting {seconds} s")


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with lmq's deployments and a worker."""
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as server:
        deploy(server.environment)
        command = prefect_command("worker", "start", "--pool", "lmq-cpu", "--type", "process")
        with running(command, server.environment, home / "worker.log"):
            yield server


@pytest.fixture(scope="session")
def wide(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer so wide that measuring it is a minute in native code."""
    path = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **shape)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


def lmq_run(config: RunConfig, place: Path) -> list[str]:
    """Command line of `lmq run` of the configuration, which is written to a file."""
    path = place / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return [sys.executable, "-m", "lmq_flows.cli", "run", str(path)]


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
