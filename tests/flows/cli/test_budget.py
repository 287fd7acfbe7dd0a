"""`lmq budget`: every size without measuring, budgets in bytes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq.allocation.budget import Budget, feasible_range, hqq_size_bytes
from lmq.formats.spec import STOPS
from lmq.model.discovery import discover
from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal


def budget_rows(printed: str, title: str) -> dict[str, list[str]]:
    """Cells of the table below a title, by the first cell of each row."""
    lines = printed[printed.index(title) :].split("└")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_budget_prints_every_size_without_measuring(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["budget", str(tiny_llama), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    structure = discover(tiny_llama)
    smallest, largest = feasible_range(structure, STOPS)
    feasible = budget_rows(printed, "Feasible sizes")
    assert feasible["paper"][0].startswith(f"{smallest:,} B = ")
    assert feasible["paper"][1].startswith(f"{largest:,} B = ")
    uniform = budget_rows(printed, "The same configuration everywhere")
    assert list(uniform) == [spec.name for spec in STOPS]
    for spec in STOPS:
        paper = sum(spec.size_bytes(module.parameters) for module in structure.modules)
        hqq = sum(hqq_size_bytes(module.parameters, spec) for module in structure.modules)
        assert uniform[spec.name][0].startswith(f"{paper:,} B = ")
        assert uniform[spec.name][1].startswith(f"{hqq:,} B = ")
    parts = budget_rows(printed, "Not quantized")
    assert parts["embeddings"] == parts["lm_head"] == ["1", "32,768", "131,072 B"]
    assert parts["all"][2] == f"{structure.other_bytes:,} B"
    assert not list((tmp_path / "store").rglob("grids*"))


def test_budgets_become_bytes(tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["4.25", "uniform b4g64 + 2%", "1 kB", "1 GB"]
    options = ["--menu", "b2g64,b4g64", "--store", str(tmp_path / "store")]
    assert main(["budget", str(tiny_qwen), asked[0], *options, *asked[1:]]) == 0
    printed = capsys.readouterr().out
    assert budget_rows(printed, "Not quantized")["lm_head"] == ["tied", "–", "–"]
    rows = budget_rows(printed, "Budgets")
    structure = discover(tiny_qwen)
    for text in asked:
        assert rows[text][0].startswith(f"{Budget.parse(text).resolve(structure):,} B = ")
    assert rows["uniform b4g64 + 2%"][1:] == ["paper", "yes: 1,575 B to spare", "b4g64 (−1.96%)", "none"]
    assert rows["4.25"][3].startswith("b2g64 (−")
    assert "short" in rows["1 kB"][2]
    assert "to spare" in rows["1 GB"][2]


def test_budget_refuses_what_cannot_be_meant(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", tiny_llama, "--store", tmp_path / "store"]
    assert "'four' is not a budget; allowed: bits per weight" in refusal(capsys, *command, "four")
    assert "'b5' is not a configuration" in refusal(capsys, *command, "--menu", "b4g64,b5")
    assert "needs at least one configuration and none twice" in refusal(capsys, *command, "--menu", "b4g64,b4g64")
    assert "there is no model directory" in refusal(capsys, "budget", tmp_path / "model", *command[2:])


def test_a_menu_of_llama_cpp_has_one_layout(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 64 weights: q4_k is q5_0, 22 bytes for 32 weights."""
    store = ("--store", str(tmp_path / "store"))
    assert main(["budget", str(tiny_llama), "uniform q4_k", "--menu", "q4_k,q8_0", *store]) == 0
    printed = capsys.readouterr().out
    assert "5.500 bpw" in printed
    assert "8.500 bpw" in printed
    assert "q4_k (exactly)" in printed
