"""Processes of a small cluster: an S3 server, a Dask scheduler, Dask workers and `lmq run`, each with its log."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from moto.server import ThreadedMotoServer

from lmq_flows.config.run import RunConfig
from lmq_storage import ArtifactStore, file_sha256

PATIENCE_S = 900
"""A loaded machine is no failure."""


def wait_until(done: Callable[[], Any], what: str, *processes: subprocess.Popen[bytes]) -> Any:
    """Result of `done` once it is true; fails when time is up or one of the processes ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        assert all(process.poll() is None for process in processes), f"a process ended before {what}"
        time.sleep(0.05)
    return found


@dataclass
class Processes:
    """Child processes and their logs; all that still run are ended at the end, with what they started."""

    place: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments; `environment` is added to that of this process."""
        temporary = self.place / f"tmp-{name}"
        temporary.mkdir(exist_ok=True)
        given = {**os.environ, "TMPDIR": str(temporary), **environment}
        given.pop("PREFECT_API_URL", None)
        with self.log(name).open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.place, env=given, stdout=stream, stderr=subprocess.STDOUT
            )
        self.running.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.place / f"{name}.log"

    def end(self) -> None:
        for process in reversed(self.running):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of S3 with the bucket `lmq`; gives the environment that reaches it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        import s3fs

        s3fs.S3FileSystem().mkdir("lmq")
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()


def start_dask(processes: Processes, workers: int) -> tuple[str, list[subprocess.Popen[bytes]]]:
    """A scheduler, and workers that nobody restarts and that share no directory; its address, and the workers."""
    found = processes.place / "scheduler.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(found))
    scheduler = processes.start("scheduler", "-m", "distributed.cli.dask_scheduler", *options)
    wait_until(lambda: found.is_file() and found.read_text(), "the scheduler's start", scheduler)
    address = json.loads(found.read_text())["address"]
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
    started = [
        processes.start(f"worker-{number}", "-m", "distributed.cli.dask_worker", address, *options)
        for number in range(workers)
    ]
    return address, started


def start_run(processes: Processes, config: RunConfig, **environment: str) -> subprocess.Popen[bytes]:
    """`lmq run` in a process of its own; `environment` is added to that of this process."""
    path = processes.place / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ("-m", "lmq_flows.cli", "run", str(path))
    return processes.start("run", *command, PREFECT_HOME=str(processes.place / "home"), **environment)


def finish(processes: Processes, run: subprocess.Popen[bytes]) -> None:
    """Wait for a good end of `lmq run`."""
    assert run.wait(timeout=PATIENCE_S) == 0, processes.log("run").read_text()


def made(config: RunConfig) -> dict[str, str]:
    """Digest of every artifact by stage and key, of every checkpoint file, and the results without what a clock says.

    Reports are left out: they hold seconds.
    """
    store = ArtifactStore(config.store)
    found = {
        f"{manifest.stage}/{manifest.key}": manifest.content_sha256
        for manifest in store.manifests()
        if manifest.stage not in ("report", "model-files")
    }
    for path in sorted((config.run_dir / "checkpoints").rglob("*")):
        if path.is_file():
            found[path.relative_to(config.run_dir).as_posix()] = file_sha256(path)
    records = json.loads((config.run_dir / "results.json").read_text())
    return found | {"results": json.dumps([{**record, "seconds": None} for record in records], sort_keys=True)}
