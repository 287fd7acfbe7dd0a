"""`lmq inspect`: modules and sizes, and what is no model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal


def test_inspect_shows_modules_and_sizes(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_llama), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 4 layers, hidden size 64" in printed
    assert "mlp.down_proj" in printed
    assert "b2g128" in printed


def test_inspect_refuses_what_is_no_model(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", tmp_path / "store"]
    assert "there is no model directory" in refusal(capsys, "inspect", tmp_path / "model", *store)
    assert "must not be empty" in refusal(capsys, "inspect", "", *store)
    assert "is quantized already (lmq)" in refusal(capsys, "inspect", made[1], *store)
    assert "is a file, not a directory" in refusal(capsys, "inspect", made[1], "--store", made[0])
