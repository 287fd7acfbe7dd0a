"""Real processes, killed in mid work and started together: nothing finished is lost, nothing wrong is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmq_storage import ArtifactStore, file_sha256
from tests.flows.conftest import tiny_config

pytestmark = pytest.mark.slow

LAYERS = 10


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory) -> Path:
    """Large enough that a layer takes tens of milliseconds: time to be killed between layers."""
    path = tmp_path_factory.mktemp("small-llama")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **shape)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


def write_config(model: Path, place: Path, name: str) -> Path:
    config = tiny_config(
        model,
        place,
        name=name,
        strategies=["uniform", "loss-aware"],
        calibration__sequences=16,
        calibration__sequence_length=128,
        evaluation__tokens=1024,
        evaluation__window=128,
        evaluation__stride=64,
    )
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@dataclass(frozen=True)
class Run:
    """`lmq run` in a process of its own; what it prints goes to a file, since its server outlives a kill."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, config: Path, home: Path) -> Run:
        environment = {**os.environ, "PREFECT_HOME": str(home)}
        environment.pop("PREFECT_API_URL", None)
        command = [sys.executable, "-m", "lmq_flows.cli", "run", str(config)]
        log = config.with_suffix(f".{time.monotonic_ns()}.log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=config.parent, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
        return cls(process, log)

    def finish(self) -> None:
        """Wait for a good end."""
        assert self.process.wait(timeout=150) == 0, self.log.read_text()

    def kill(self) -> None:
        """kill -9, then the Prefect server that the process had started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL, "the run was over before it was killed"
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


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


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    Run.start(write_config(model, place, "resume"), place / "home").finish()
    return content(place / "runs" / "resume")


@pytest.mark.parametrize(("stage", "enough"), [("sampled-backward", 2), ("quantize", 4)])
def test_killed_run_goes_on_where_it_was(model, undisturbed, tmp_path, stage, enough):
    config = write_config(model, tmp_path, "resume")
    run = Run.start(config, tmp_path / "home")
    manifests = tmp_path / "store" / "manifests"
    deadline = time.monotonic() + 60
    while run.process.poll() is None and len(list((manifests / stage).glob("*.json"))) < enough:
        assert time.monotonic() < deadline, "the run never got as far as the kill"
        time.sleep(0.002)
    run.kill()
    finished = {path: path.stat().st_mtime_ns for path in manifests.rglob("*.json")}
    total = 2 * LAYERS if stage == "quantize" else LAYERS
    assert enough <= sum(path.parent.name == stage for path in finished) < total
    assert ArtifactStore(str(tmp_path / "store")).verify() == []

    Run.start(config, tmp_path / "home").finish()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was repeated"
    assert content(tmp_path / "runs" / "resume") == undisturbed


def test_two_runs_at_once_on_one_store(model, undisturbed, tmp_path):
    names = ("one", "two")
    runs = [Run.start(write_config(model, tmp_path, name), tmp_path / f"home-{name}") for name in names]
    for run in runs:
        run.finish()
    for name in names:
        assert content(tmp_path / "runs" / name) == undisturbed
    store = ArtifactStore(str(tmp_path / "store"))
    assert store.verify() == []
    assert not any((tmp_path / "store" / "tmp").iterdir())
