"""The Prefect server that a process starts for itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    Settings,
    get_current_settings,
    temporary_settings,
)

from lmq.errors import LmqError
from lmq_flows.run import own_server
from tests.flows.prefect_server import SharedServer
from tests.flows.processes import wait_until


@pytest.fixture
def settings(server: SharedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Prefect set to no server, in a home of its own."""
    shutil.copy(server.new_database, tmp_path / "prefect.db")
    database = {PREFECT_SERVER_DATABASE_CONNECTION_URL: None}
    monkeypatch.setattr(own_server, "_started", None)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with temporary_settings({PREFECT_HOME: tmp_path, PREFECT_API_URL: None, **database}) as settings:
        yield settings
        if own_server._started is not None:
            own_server._end(own_server._started.process)


def test_a_server_that_was_ended_is_started_again(settings: Settings) -> None:
    own_server.start_own_server()
    first = own_server._started
    assert first is not None
    assert settings.api.url == first.url
    assert httpx.get(f"{first.url}/health").status_code == 200
    own_server.start_own_server()
    assert own_server._started is first
    retries = settings.client.max_retries
    assert retries > 0
    first.process.kill()
    wait_until(lambda: settings.client.max_retries == 0, "requests that are not tried again")
    assert own_server.own_server_is_gone()
    own_server.start_own_server()
    assert not own_server.own_server_is_gone()
    assert settings.client.max_retries == retries
    assert httpx.get(f"{settings.api.url}/health").status_code == 200


def test_no_server_is_started_where_prefect_is_set_to_one(settings: Settings) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        own_server.start_own_server()
        assert get_current_settings().api.url == "http://127.0.0.1:9/api"
    assert own_server._started is None


def test_a_server_that_does_not_start_ends_as_one_message(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/not/there/prefect.db"}
    monkeypatch.setattr(own_server, "_ENVIRONMENT", {**own_server._ENVIRONMENT, **where})
    with pytest.raises(LmqError, match=r"ended with code \d+; run `prefect server start` beside"):
        own_server.start_own_server()
