"""Runs in real processes, which can be killed, on a small model: for tests of what a run survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmq_storage import file_sha256
from tests.flows.conftest import tiny_config

LAYERS = 10
PATIENCE_S = 300
"""Only a hang takes longer, also on a busy machine."""


def save_small_llama(tokenizer: Path, path: Path, layers: int = LAYERS, width: int = 256) -> Path:
    """A model large enough that a layer takes tens of milliseconds: time to be killed between layers."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    shape["num_attention_heads"] = 4
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **shape)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def write_config(model: Path, place: Path, name: str, **changes: Any) -> Path:
    """A configuration file for a run of the small model with its store and results below `place`."""
    changes = {
        "strategies": ["uniform", "loss-aware"],
        "measure__menu": ["b3g64", "b4g64", "b5g64"],
        "calibration__sequences": 16,
        "calibration__sequence_length": 128,
        "evaluation__tokens": 1024,
        "evaluation__window": 128,
        "evaluation__stride": 64,
        **changes,
    }
    config = tiny_config(model, place, **{"name": name, **changes})
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@dataclass
class Runner:
    """Starts runs, by forking a process that has imported lmq already."""

    server: subprocess.Popen[str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, *arguments: str, place: Path, environment: dict[str, str] | None = None) -> Run:
        """`lmq ARGUMENTS…` in a process of its own."""
        log = place / f"{time.monotonic_ns()}.log"
        request = {"argv": arguments, "cwd": str(place), "log": str(log), "environment": environment or {}}
        return Run(self, self._ask(request), log)

    def run(self, config: Path, **environment: str) -> Run:
        """`lmq run CONFIG`."""
        return self.start("run", str(config), place=config.parent, environment=environment)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        with self.lock:
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            return int(self.server.stdout.readline())


@dataclass(frozen=True)
class Run:
    """A started command."""

    runner: Runner
    pid: int
    log: Path

    @property
    def is_over(self) -> bool:
        """Whether it ended, by itself or not."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    @property
    def output(self) -> str:
        """What it printed."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        wait_until(lambda: self.is_over, f"process {self.pid} to end", lambda: self.output, look_every_s=0.05)
        return self.runner._ask({"wait": self.pid})

    def finish(self) -> str:
        """Wait for a good end; returns what was printed."""
        code = self.wait()
        assert code == 0, self.output
        return self.output

    def end_with_its_server(self) -> None:
        """Kill it where it still runs, and wait for the end of the server that it started: nobody tells that to end.

        Forked processes end without what Python does at the end, as processes that are killed.
        """
        with suppress(FileNotFoundError):  # it was waited for
            if not self.is_over:
                self.kill()
        wait_until(lambda: not self._group(), f"the end of the server of process {self.pid}", look_every_s=0.05)

    def _group(self) -> list[str]:
        """What still runs of the group of processes that it leads."""
        running = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if group == str(self.pid) and state != "Z" and stat.parent.name != str(self.pid):
                    running.append(stat.parent.name)
        return running

    def kill(self) -> bool:
        """kill -9; returns whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


@contextmanager
def forking_runner(**environment: str) -> Iterator[Runner]:
    """A runner whose runs get these settings, such as the address of a Prefect server."""
    script = Path(__file__).with_name("fork_runs.py")
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Runner(server)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


def wait_until(
    condition: Callable[[], bool], what: str, otherwise: Callable[[], str] = str, look_every_s: float = 0.002
) -> None:
    """Wait for something that a working program does in the end."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{otherwise()}"
        time.sleep(look_every_s)


def content(run_dir: Path) -> dict[str, str]:
    """Digests of the checkpoints, and the results without what a clock says."""
    found = {
        path.relative_to(run_dir).as_posix(): file_sha256(path)
        for path in sorted((run_dir / "checkpoints").rglob("*"))
        if path.is_file()
    }
    records = json.loads((run_dir / "results.json").read_text())
    found["results"] = json.dumps([{**record, "seconds": None} for record in records], sort_keys=True)
    return found


def finished_work(store: Path) -> dict[Path, int]:
    """Manifests of a local store with the times they were written at."""
    return {path: path.stat().st_mtime_ns for path in (store / "manifests").rglob("*.json")}
