"""`lmq doctor`: what it finds, what to do about it, and when it fails."""

from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from lmq_flows.cli import doctor, main

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
NOBODY = "http://127.0.0.1:9"
"""The port of the discard protocol, where nothing listens."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine without a server, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    with temporary_settings({PREFECT_API_URL: None}):
        yield


def examined(capsys: pytest.CaptureFixture[str], code: int, *options: str) -> dict[str, dict[str, str | None]]:
    """What `lmq doctor --json` found, by what it looked at."""
    capsys.readouterr()
    assert main(["doctor", "--json", *options]) == code
    return {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def with_version(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda asked: version if asked == name else real(asked))


def test_nothing_breaks_where_the_tests_run_and_offline_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(capsys, 0)
    assert {"Python", "packages", "processors", "GPU", "store", "runs", "Prefect server", "hub"} <= found.keys()
    assert found["hub"]["level"] == "note"
    assert "HF_HUB_OFFLINE" in str(found["hub"]["found"])
    assert main(["doctor"]) == 0
    assert "nothing here will break" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "version"), [("fastapi", "0.165.0"), ("sqlalchemy", "2.1.0"), ("prefect", "3.9.1")])
def test_versions_that_break_are_named_with_the_pin_of_pyproject(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_version(monkeypatch, name, version)
    (finding,) = [each for what, each in examined(capsys, 1).items() if what.startswith(f"package {name}")]
    assert (finding["level"], finding["found"]) == ("breaks", version)
    pin = re.search(rf'"{name}([^"]+)"', PYPROJECT.read_text())
    assert pin is not None
    for bound in pin[1].split(","):
        assert bound in str(finding["todo"])


def test_what_is_missing_breaks_and_what_is_optional_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_version(monkeypatch, "peft", None)
    found = examined(capsys, 0)["optional: LoRA on top of packed layers"]
    assert (found["level"], found["found"]) == ("note", "without peft")
    assert "pip install 'lmq[lora]'" in str(found["todo"])
    with_version(monkeypatch, "pulp", None)
    (finding,) = [each for what, each in examined(capsys, 1).items() if what.startswith("package pulp")]
    assert finding["found"] == "not installed"


def test_a_place_that_cannot_be_written_in_breaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    found = examined(capsys, 1, "--store", "taken")
    assert found["store"]["level"] == "breaks"
    assert "is a file, not a directory" in str(found["store"]["found"])
    assert found["runs"]["level"] in ("ok", "note")  # as much room as this machine has


def test_a_server_that_does_not_answer_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: f"{NOBODY}/api"}):
        found = examined(capsys, 1)["Prefect server"]
    assert found["level"] == "breaks"
    assert f"{NOBODY}/api does not answer" in str(found["found"])
    assert "unset PREFECT_API_URL" in str(found["todo"])


@pytest.mark.slow
def test_a_server_that_answers_is_seen(server: None) -> None:
    assert doctor._server().level == "ok"


def test_the_hub_is_asked_where_it_is_set_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    assert examined(capsys, 0)["hub"]["level"] == "note"
    hub = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    assert examined(capsys, 0)["hub"]["level"] == "ok"
    hub.shutdown()
    hub.server_close()
