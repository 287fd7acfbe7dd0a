"""`lmq store`: list, verify, clean, and what is no store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal


def test_the_store_is_listed_verified_and_cleaned(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(made[0].parent / "store", store)
    assert main(["store", "ls", "--store", str(store)]) == 0
    assert "quantize" in capsys.readouterr().out
    assert main(["store", "verify", "--store", str(store)]) == 0
    assert "every artifact is sound" in capsys.readouterr().out
    assert main(["store", "gc", "--store", str(store), "--keep-hours", "0", "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    blob = max((path for path in (store / "blobs").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert main(["store", "verify", "--store", str(store)]) == 1
    assert "1 damaged" in capsys.readouterr().out


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no store" in refusal(capsys, "store", "ls", "--store", tmp_path / "nothing")
    assert "Protocol not known: foo" in refusal(capsys, "store", "ls", "--store", "foo://x")
