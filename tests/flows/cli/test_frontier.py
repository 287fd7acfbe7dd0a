"""`lmq frontier`: budgets solved from the store, and refusals."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import yaml

from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal


def test_frontier_solves_all_budgets_from_the_store(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(run_dir), "--points", "20"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: loss-aware fisher=sequence, 20 budgets" in printed
    assert "(nats per token)" in printed
    assert len([line for line in printed.splitlines() if line.startswith("│")]) == 10
    with (run_dir / "frontier-tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["budget_bytes", "bits_per_weight", "size_bytes", "objective", "lower_bound", "gap"]
    assert len(rows) == 20
    objectives = [float(row["objective"]) for row in rows]
    assert objectives == sorted(objectives, reverse=True)
    assert all(int(row["size_bytes"]) <= int(row["budget_bytes"]) for row in rows)
    picture = (run_dir / "frontier-tiny.svg").read_text()
    assert "measured rise of log-perplexity" in picture
    assert "uniform, measured" in picture


def test_frontier_of_another_strategy_from_the_same_measurements(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", str(run_dir), "--points", "3", "--strategy", "mxq", "--model", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: mxq, 3 budgets" in printed
    assert "nats" not in printed


def test_frontier_for_a_target_from_the_same_measurements(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(run_dir), "--points", "5", "--target", "gptq"]) == 0
    assert "for gptq, 5 budgets" in capsys.readouterr().out
    with (run_dir / "frontier-tiny-for-gptq.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert all(float(row["gap"]) <= 1e-9 for row in rows)
    assert "did you mean 'gptq'" in refusal(capsys, "frontier", run_dir, "--points", "3", "--target", "gptqq")


def test_frontier_refuses_what_the_run_does_not_have(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["frontier", run_dir, "--points", "3"]
    assert "unknown model of run 'tiny': 'tny'; did you mean 'tiny'" in refusal(capsys, *command, "--model", "tny")
    assert "did you mean 'mxq'" in refusal(capsys, *command, "--strategy", "mxqq")
    assert "uniform solves no program" in refusal(capsys, *command, "--strategy", "uniform")
    message = refusal(capsys, *command, "--strategy", "sensi-milp")
    assert "did not measure sensitivity, which sensi-milp needs; draw a strategy of the run ('uniform'," in message
    assert "it has no results.json" in refusal(capsys, "frontier", tmp_path)


def test_frontier_names_what_is_gone_from_the_store(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    def point_at(store: Path) -> None:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "store": str(store)}))

    point_at(tmp_path / "nothing")
    assert "there is no store" in refusal(capsys, "frontier", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    point_at(tmp_path / "empty")
    message = refusal(capsys, "frontier", tmp_path / "run")
    assert "does not hold discover of tiny: it was removed, or this lmq measures differently" in message
    assert message.endswith("make it again with `lmq run` of that file")
    (tmp_path / "run" / "config.yaml").unlink()
    assert "the run has not ended" in refusal(capsys, "frontier", tmp_path / "run")
