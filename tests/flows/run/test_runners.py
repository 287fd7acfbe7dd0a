"""Runs spread by Dask and by Ray give the bytes that threads give; runners that cannot work are refused."""

import importlib
import json
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from lmq.errors import InputError
from lmq_flows.config.sections import RunnerConfig
from lmq_flows.run.runners import check_runner, started_runner
from lmq_storage import ArtifactStore, file_sha256
from tests.flows.conftest import layers_of, run_and_look, tiny_config


def quick_config(model: Path, place: Path, kind: str):
    """A run of every kind of stage that has a chain, a fan-out and a join, at the smallest size."""
    changes = {"strategies": ["loss-aware"], "runner__kind": kind, "runner__workers": 2}
    return tiny_config(model, place, **changes)


def made(config):
    """Digest of every artifact by stage and configuration, and the results without what a clock says."""
    found = {
        f"{manifest.stage} {manifest.key}": manifest.content_sha256
        for manifest in ArtifactStore(config.store).manifests()
        if manifest.stage != "report"  # holds seconds
    }
    for path in sorted((config.run_dir / "checkpoints").rglob("*")):
        if path.is_file():
            found[path.relative_to(config.run_dir).as_posix()] = file_sha256(path)
    records = json.loads((config.run_dir / "results.json").read_text())
    return found, [{**record, "seconds": None} for record in records]


@pytest.fixture(scope="module")
def by_threads(server, tiny_llama, tmp_path_factory):
    config = quick_config(tiny_llama, tmp_path_factory.mktemp("threads"), "threads")
    run_and_look(config)
    return made(config)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_processes_make_the_same_bytes_as_threads(server, by_threads, tiny_llama, tmp_path, kind):
    config = quick_config(tiny_llama, tmp_path, kind)
    done = run_and_look(config)
    assert done.state.is_completed(), done.state.message
    artifacts, results = made(config)
    assert {name for name, digest in by_threads[0].items() if artifacts.get(name) != digest} == set()
    assert results == by_threads[1]
    assert any(len(layers_of(row)) > 1 for row in done.rows), "no task carried several layers"


def test_missing_package_is_named_with_what_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"needs the package prefect-dask .* pip install 'lmq\[dask\]'"):
        check_runner(RunnerConfig(kind="dask"), "/store")


def test_store_of_one_process_is_refused():
    with pytest.raises(InputError, match=r"seen by one process only.*s3://bucket/lmq"):
        check_runner(RunnerConfig(kind="ray"), "memory://lmq")
    check_runner(RunnerConfig(), "memory://lmq")


@pytest.mark.parametrize("url", ["http://127.0.0.1:4200/api", "http://localhost:4200/api"])
def test_workers_elsewhere_need_a_server_they_reach(url):
    there = RunnerConfig(kind="dask", address="tcp://10.0.0.7:8786")
    with temporary_settings({PREFECT_API_URL: url}):
        with pytest.raises(InputError, match=r"PREFECT_API_URL.*prefect server start --host"):
            check_runner(there, "s3://bucket/lmq")
        check_runner(RunnerConfig(kind="dask", address="tcp://127.0.0.1:8786"), "s3://bucket/lmq")
    with temporary_settings({PREFECT_API_URL: "http://10.0.0.2:4200/api"}):
        check_runner(there, "s3://bucket/lmq")


def test_cluster_that_does_not_answer_is_named(server, monkeypatch):
    monkeypatch.setattr("lmq_flows.run.runners.CONNECT_TIMEOUT_S", 1)
    with (
        pytest.raises(InputError, match=r"no Dask cluster.*tcp://127.0.0.1:9"),
        started_runner(RunnerConfig(kind="dask", address="tcp://127.0.0.1:9")),
    ):
        pass


def test_temporary_directory_that_is_too_long_for_ray_is_named(server, tmp_path, monkeypatch):
    (tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    monkeypatch.setattr("tempfile.tempdir", None)  # what Python remembers of it
    with (
        pytest.raises(InputError, match=r"longlong is too long .* set TMPDIR"),
        started_runner(RunnerConfig(kind="ray")),
    ):
        pass


def test_address_is_for_clusters():
    with pytest.raises(ValueError, match=r"address = 'tcp://x:1' is for kind dask or ray"):
        RunnerConfig(address="tcp://x:1")
