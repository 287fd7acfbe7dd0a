"""`lmq plan`: what is cached, and why a stage would run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq_flows.cli import main


def test_plan_says_what_is_cached(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "grids" in printed
    assert "cached" in printed
    assert "never made" not in printed


def test_plan_says_why_a_stage_would_run(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--set", "evaluation.window=128"]) == 0
    assert "window: 64 → 128" in " ".join(capsys.readouterr().out.split())
