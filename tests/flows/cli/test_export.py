"""`lmq export`: what it prints and returns, and its refusals."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

import lmq.export.check
from lmq.export.check import Tolerance, export_checked
from lmq_flows.cli import main
from tests.lmq.export.small_checkpoints import write_small


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tiny_llama, tmp_path_factory.mktemp("made") / "q", "b4g64", "b3g32").path


def _export(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["export", str(checkpoint), "-o", str(output), *options])


def _refusal(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path, *options: str) -> str:
    capsys.readouterr()
    assert _export(checkpoint, output, *options) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lmq: ")
    assert "Traceback" not in printed.out + printed.err
    return printed.err


def test_tables_of_steps_and_check(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _export(checkpoint, tmp_path / "out", "--format", "hqq") == 0
    printed = capsys.readouterr().out
    size_bytes = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert f"hqq: 5 files, {size_bytes:,} bytes, 28 quantized matrices" in printed
    for words in ("4bit_u8 g64", "3bit_32 g32", "all", "noise of the same step errors", f"checked: {tmp_path / 'out'}"):
        assert words in printed


def test_without_the_check(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--format", "safetensors", "--dtype", "float16", "--no-check")
    assert _export(checkpoint, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert "float16" in printed
    assert "not checked" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failed_check(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = partial(export_checked, tolerance=Tolerance(noise_factor=0, kl_floor=0, ties=0))
    monkeypatch.setattr(lmq.export.check, "export_checked", strict)
    assert _export(checkpoint, tmp_path / "out", "--format", "safetensors", "--dtype", "bfloat16") == 1
    printed = capsys.readouterr().out
    assert "check failed: KL divergence" in printed
    assert f"the export is kept as {tmp_path / '.unchecked-out'}" in printed
    assert not (tmp_path / "out").exists()


def test_refusals(checkpoint: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    plain = ("--format", "safetensors")
    assert "has no config.json" in _refusal(capsys, tmp_path / "missing", out, *plain)
    assert "is not a checkpoint written by lmq" in _refusal(capsys, tiny_llama, out, *plain)
    assert f"{checkpoint} exists already" in _refusal(capsys, checkpoint, checkpoint, *plain)
    message = _refusal(capsys, checkpoint, out, "--format", "gguf", "--dtype", "float16")
    assert "--dtype is not an option of gguf (its options: --fidelity, --tensor-types)" in message
    message = _refusal(capsys, checkpoint, out, "--format", "compressed-tensors")
    assert "cannot be written for vllm" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "gpt_neox",
            "the model type gpt_neox is not one that is exported (gemma2, gemma3_text, llama, mistral, phi3, ",
        ),
        ("nonesuch", "config.json describes no model that transformers has"),
    ],
)
def test_architectures_without_a_gguf_form(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "q")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert message in _refusal(capsys, tmp_path / "q", tmp_path / "m.gguf", "--format", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_gguf_with_the_plan_for_llama_quantize(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--format", "gguf", "--tensor-types", str(tmp_path / "types.txt"))
    assert _export(checkpoint, tmp_path / "m.gguf", *options) == 0
    printed = capsys.readouterr().out
    for words in ("28 quantized matrices", "Q4_1", "llama-quantize --tensor-type-file", f"checked: {tmp_path}"):
        assert words in printed
    assert len((tmp_path / "types.txt").read_text().splitlines()) == 28
    assert "types.txt exists already" in _refusal(capsys, checkpoint, tmp_path / "n.gguf", *options)


def test_an_unknown_format_is_refused_with_the_known_ones(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _export(checkpoint, checkpoint / "out", "--format", "ggml")
    assert "invalid choice: 'ggml' (choose from" in capsys.readouterr().err
