"""Real clusters of several processes: the bytes are those of threads, also when a worker is killed in mid run.

pytest tests/scale
"""

from __future__ import annotations

import os
import signal
import tempfile

import psutil
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.flows.conftest import tiny_config
from tests.scale.clusters import Processes, finish, made, s3_server, start_dask, start_run, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LAYERS = 10


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    """Large enough that its layers fill several chunks."""
    path = tmp_path_factory.mktemp("small-llama")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **shape)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


def a_config(model, place, **changes):
    sizes = {"calibration__sequences": 16, "calibration__sequence_length": 128, "evaluation__tokens": 1024}
    return tiny_config(model, place, strategies=["uniform", "kurt-boost", "loss-aware"], **sizes, **changes)


@pytest.fixture
def processes(tmp_path):
    found = Processes(tmp_path)
    yield found
    found.end()


@pytest.fixture(scope="module")
def by_threads(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("threads")
    processes, config = Processes(place), a_config(model, place)
    finish(processes, start_run(processes, config))
    processes.end()
    return made(config)


def different(config, expected):
    found = made(config)
    return {name for name in {*found, *expected} if found.get(name) != expected.get(name)}


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "worker killed"])
def test_two_workers_that_share_only_an_s3_store(model, by_threads, processes, tmp_path, killed):
    with s3_server():
        address, workers = start_dask(processes, workers=2)
        runner = {"runner__kind": "dask", "runner__address": address, "store": "s3://lmq/store"}
        config = a_config(model, tmp_path, **runner)
        run = start_run(processes, config)
        if killed:
            wait_until(lambda: 2 <= count(config, "sampled-backward") < LAYERS - 2, "the backward chain", run)
            busy = max(workers, key=lambda worker: psutil.Process(worker.pid).cpu_times().user)
            busy.send_signal(signal.SIGKILL)
        finish(processes, run)
        assert different(config, by_threads) == set()
        assert verify(ArtifactStore(config.store)) == []
        for number in range(2):
            cache = list((tmp_path / f"tmp-worker-{number}").glob("lmq-cache-*/*/blobs/*/*"))
            assert cache, f"worker {number} read nothing from the store"
            assert list((tmp_path / f"tmp-worker-{number}").glob("lmq-cache-*/*/laid-out/*/model.safetensors"))


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_killed_worker_of_a_cluster_of_this_machine(model, by_threads, processes, tmp_path, short_dir, kind):
    config = a_config(model, tmp_path, runner__kind=kind)
    run = start_run(processes, config, TMPDIR=short_dir)
    wait_until(lambda: 2 <= count(config, "grids") < LAYERS - 2, "the grids of some layers", run)
    os.kill(busiest_worker(run.pid, kind), signal.SIGKILL)
    finish(processes, run)
    assert different(config, by_threads) == set()


@pytest.fixture
def short_dir():
    """Ray's sockets lie below the temporary directory, and their paths have at most 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="lmq-", ignore_cleanup_errors=True) as name:
        yield name


def count(config, stage):
    return len(list(ArtifactStore(config.store).manifests(stage)))


def busiest_worker(pid, kind):
    """The worker process below `pid` that has used the processor most."""
    mark = {"dask": "multiprocessing", "ray": "ray::"}[kind]
    below = psutil.Process(pid).children(recursive=True)
    workers = [process for process in below if mark in " ".join(process.cmdline())]
    return max(workers, key=lambda process: process.cpu_times().user).pid
