"""`lmq compare`: its table, its JSON, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmq.evaluation.whole_model import evaluate_checkpoint
from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal

TEXT = ["--tokens", "256", "--window", "64", "--stride", "32"]


def test_json_holds_what_evaluate_measures(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tiny_llama), str(made[1]), *TEXT, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    options = {"text": "pydoc-topics", "column": "text", "tokens": 256, "window": 64, "stride": 32}
    expected = evaluate_checkpoint(made[1], reference=tiny_llama, **options)
    plain, quantized = printed["models"]
    assert printed["reference"] == plain["model"] == str(tiny_llama)
    assert plain["kl_divergence"] is plain["top1_agreement"] is None
    assert expected.kl_divergence is not None
    assert quantized["kl_divergence"] == pytest.approx(expected.kl_divergence.value, rel=1e-5)
    assert quantized["perplexity"] == pytest.approx(expected.perplexity.value, rel=1e-5)
    assert quantized["top1_agreement"] == expected.top1_agreement
    assert quantized["disk_bytes"] == sum(file.stat().st_size for file in made[1].iterdir())
    assert quantized["memory_resident_bytes"] is quantized["performance_host"] is None
    assert isinstance(quantized["sample"], str)


def test_tables_show_what_was_asked_for(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compare", str(made[1]), *TEXT, "--reference", str(tiny_llama)]
    assert main([*line, "--performance"]) == 0
    printed = capsys.readouterr().out
    for words in ("On disk", "Perplexity", "Top-1", "Resident", "measured on", "goes on"):
        assert words in printed
    assert main([*line, "--markdown", "--no-samples"]) == 0
    header, rule, row, *_, note = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| Model | On disk | Perplexity (strided 64/32) | KL to reference | Top-1 |")
    assert rule == "| :--- | ---: | ---: | ---: | ---: |"
    assert row.startswith(f"| {made[1]} | ")
    assert note == f"- reference: {tiny_llama}"


def test_what_cannot_be_compared_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = refusal(capsys, "compare", tiny_llama, f"{tiny_llama}x", *TEXT)
    assert f"there is no model directory {tiny_llama}x; did you mean {tiny_llama}?" in missing
    assert "is given twice" in refusal(capsys, "compare", tiny_llama, tiny_llama, *TEXT)
    wide = refusal(capsys, "compare", tiny_llama, "--window", "512")
    assert wide.startswith("--window = 512 is more than the 256 tokens")
    assert "is not a model" in refusal(capsys, "compare", tiny_llama, "small model", *TEXT)
