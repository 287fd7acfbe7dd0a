"""A Prefect server, a process that starts runs on it, and what a run makes when nothing disturbs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from tests.flows.processes import content, finished_work, forking_runner, save_small_llama, write_config

LAYERS = 4


@pytest.fixture(scope="session")
def server():
    with prefect_test_harness(server_startup_timeout=300):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def runner(server):
    with forking_runner(PREFECT_API_URL=server) as runner:
        yield runner


@pytest.fixture(scope="session")
def model(tiny_llama, tmp_path_factory) -> Path:
    return save_small_llama(tiny_llama, tmp_path_factory.mktemp("small-llama"), LAYERS)


@pytest.fixture(scope="session")
def whole(runner, model, tmp_path_factory) -> dict[str, Any]:
    """What an undisturbed run makes: its results, and how many artifacts there are in the end."""
    place = tmp_path_factory.mktemp("undisturbed")
    runner.run(write_config(model, place, "whole")).finish()
    return {"content": content(place / "runs" / "whole"), "artifacts": len(finished_work(place / "store"))}


@pytest.fixture
def note(request, capsys):
    """Say on the terminal what was done and what was lost: the figures of docs/reliability.md."""

    def say(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {request.node.name}: {text}\n")

    return say
