"""`lmq deploy` without a server."""

from __future__ import annotations

import pytest

from tests.flows.cli.conftest import refusal


def test_deploying_needs_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "PREFECT_API_URL names no server" in refusal(capsys, "deploy")
