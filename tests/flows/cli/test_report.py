"""`lmq report`: tables, a page of several runs, and what is no run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lmq.report.results import VariantResult, write_results
from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal


def test_report_shows_what_of_the_budget_is_used(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith("│")) <= 140
    assert "−2.346 MB" in printed
    assert " 0 B " in printed
    assert "mxq @ uniform b4g64 failed: out of memory" in printed
    assert "report.html is missing" in printed


def test_several_runs_are_compared_on_one_page(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run_dir, tmp_path / "other")
    page = tmp_path / "both.html"
    assert main(["report", str(run_dir), str(other), "--latex", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\\begin{tabular}") == 2
    assert "sensi-boost" in page.read_text()
    assert f"two runs are called {run_dir.name}" in refusal(capsys, "report", run_dir, run_dir)


def test_what_is_no_run_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "night").mkdir(parents=True)
    results = tmp_path / "runs" / "night" / "results.json"
    write_results(results, [VariantResult(model="m", strategy="full-precision", perplexity=9.0)])
    whole = results.read_text()
    monkeypatch.chdir(tmp_path)
    assert "not the directory of a finished run" in refusal(capsys, "report", tmp_path)
    assert "there is no run 'day'" in (said := refusal(capsys, "report", "day"))
    assert "runs here: night" in said
    assert "is a file, not the directory of a run" in refusal(capsys, "report", results)
    results.write_text(whole[: len(whole) // 2])
    assert "is damaged" in refusal(capsys, "report", "night")
    results.write_text(whole.replace('"perplexity"', '"confusion"'))
    assert "another version of lmq may have written it" in refusal(capsys, "report", "night")
    results.write_text(whole.replace("9.0", "NaN"))
    assert "perplexity of m full-precision is nan" in refusal(capsys, "report", "night")
    results.write_text("{}")
    assert "holds a dict where a list of variants was expected" in refusal(capsys, "report", "night")
