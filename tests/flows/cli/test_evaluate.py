"""`lmq evaluate`: what it prints, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmq.checkpoint.config import FORMAT_VERSION
from lmq_flows.cli import main
from tests.flows.cli.conftest import refusal

EVALUATION = ["--tokens", "256", "--window", "64", "--stride", "32"]


def test_evaluate_prints_the_perplexity_of_a_checkpoint_and_of_its_model(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made[1], tiny_llama):
        assert main(["evaluate", str(path), *EVALUATION]) == 0
        assert "(strided 64/32, 255 tokens scored)" in capsys.readouterr().out


def test_evaluate_compares_with_the_unquantized_model_and_names_tasks_without_data(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    arguments = [str(made[1]), *EVALUATION, "--reference", str(tiny_llama), "--tasks", "winogrande"]
    assert main(["evaluate", *arguments]) == 1
    out = capsys.readouterr().out
    assert "KL to the reference 0." in out
    assert "top-1 agreement" in out
    assert "winogrande was not measured: the data of task 'winogrande' is not at hand" in out


def test_models_may_be_gguf_files(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "model.gguf")
    assert main(["export", str(made[1]), "--format", "gguf", "--output", file]) == 0
    assert main(["evaluate", file, *EVALUATION, "--reference", file, "--store", str(tmp_path / "store")]) == 0
    assert "KL to the reference 0.0000" in capsys.readouterr().out


def test_evaluate_refuses_a_checkpoint_of_a_newer_version(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "evaluate", checkpoint, *EVALUATION)
    assert (
        f"has lmq format version {FORMAT_VERSION + 1}, this lmq reads version {FORMAT_VERSION}; install the version"
        in message
    )


def test_evaluate_refuses_more_tokens_at_once_than_the_model_sees(
    made: tuple[Path, Path], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (made[1], tiny_llama):
        message = refusal(capsys, "evaluate", path, "--window", "512")
        assert message.startswith("--window = 512 is more than the 256 tokens")
        assert message.endswith("set it to 256 or less")


def test_evaluate_refuses_texts_and_models_that_are_not_there(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("three words only")
    assert "there is no model directory" in refusal(capsys, "evaluate", tmp_path / "model")
    lost = ["--reference", tmp_path / "model", *EVALUATION]
    assert "there is no model directory" in refusal(capsys, "evaluate", tiny_llama, *lost)
    packaged = ["--reference", "package:lmq_lost/model.gguf", *EVALUATION]
    assert "lmq_lost" in refusal(capsys, "evaluate", tiny_llama, *packaged)
    missing = ["--text", tmp_path / "shrt.txt", *EVALUATION]
    assert "short.txt?" in refusal(capsys, "evaluate", tiny_llama, *missing)
    short = ["--text", tmp_path / "short.txt", *EVALUATION]
    assert "fewer than one window of 64" in refusal(capsys, "evaluate", tiny_llama, *short)
    wide = ["--window", "64", "--stride", "65"]
    assert "stride = 65 does not fit a window of 64" in refusal(capsys, "evaluate", tiny_llama, *wide)
