from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmq.export.dense as dense
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError, LmqError
from lmq.export import FORMATS, export_format
from lmq.export.check import NEW_TOKENS, PROMPTS, Tolerance, check_export, export_checked
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.quantizers import quantizer
from tests.lmq.export.small_checkpoints import write_small


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> QuantizedCheckpoint:
    return write_small(tiny_llama, tmp_path / "q", "b4g64")


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("safetensors", {"dtype": "bfloat16"}),
        ("hqq", {}),
        ("gguf", {}),
        ("compressed-tensors", {}),
    ],
)
def test_every_format_passes(tiny_llama: Path, tmp_path: Path, format_name: str, options: dict[str, str]) -> None:
    structure = discover(tiny_llama)
    choice = dict.fromkeys((info.id for info in structure.modules), QuantSpec(4, 32))
    write_checkpoint(tmp_path / "q", tiny_llama, structure, choice, quantizer("rtn", integer_zeros=True))
    target = tmp_path / "out.gguf"
    report, check = export_checked(QuantizedCheckpoint(tmp_path / "q"), target, format_name, options)
    assert check.passed, check.failures
    assert report.path == target
    assert target.exists()
    assert 0 < check.difference.kl_divergence < 4 * check.noise.kl_divergence
    assert 0 < check.difference.logit_difference < 0.05
    assert check.difference.top1_agreement > 0.95
    assert check.difference.tokens > len(PROMPTS) * NEW_TOKENS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "q"]


def test_what_changed_nothing_differs_in_nothing(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    _, check = export_checked(checkpoint, tmp_path / "out", "safetensors", {})
    assert check.passed
    for difference in (check.difference, check.noise):
        assert (difference.logit_difference, difference.top1_agreement) == (0, 1)
        assert difference.kl_divergence == pytest.approx(0, abs=1e-7)
    assert check.greedy_agreement == 1


def test_rows_in_another_order_are_found(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = dense.export(checkpoint, tmp_path / "out", dtype="float16")
    name = "model.layers.1.self_attn.k_proj.weight"
    _change(tmp_path / "out", lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))
    check = check_export(checkpoint, report, "safetensors")
    assert not check.passed
    assert check.failures[0].startswith("KL divergence ")
    assert "noise of the same step errors causes " in check.failures[0]
    assert check.difference.kl_divergence > 100 * check.noise.kl_divergence


def test_a_lossless_export_must_generate_the_same(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = dense.export(checkpoint, tmp_path / "out")
    _change(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].neg_())
    failures = check_export(checkpoint, report, "safetensors").failures
    assert [failure.split()[0] for failure in failures] == ["KL", "100.0%", "no"]
    assert "of the predictions differ, above" in failures[1]
    assert failures[2] == "no weight was changed, yet only 0% of the generated tokens are the same"


def test_values_that_are_not_finite_fail(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = dense.export(checkpoint, tmp_path / "out", dtype="float16")
    _change(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    assert any(
        failure.startswith("KL divergence nan") for failure in check_export(checkpoint, report, "safetensors").failures
    )


def test_a_step_that_costs_too_much_fails_although_it_is_explained(
    checkpoint: QuantizedCheckpoint, tmp_path: Path
) -> None:
    tolerance = Tolerance(kl_most=1e-6)
    _, check = export_checked(checkpoint, tmp_path / "out", "safetensors", {"dtype": "bfloat16"}, tolerance=tolerance)
    assert [failure.partition(":")[2] for failure in check.failures] == [
        " the format does not hold this checkpoint closely enough"
    ]


def test_an_export_that_fails_keeps_its_other_name(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    strict = Tolerance(noise_factor=0, kl_floor=0, ties=0)
    options = {"dtype": "bfloat16"}
    report, check = export_checked(checkpoint, tmp_path / "out", "safetensors", options, tolerance=strict)
    assert not check.passed
    assert report.path == tmp_path / ".unchecked-out"
    assert (report.path / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"\.unchecked-out exists already"):
        export_checked(checkpoint, tmp_path / "out", "safetensors", options)
    with pytest.raises(InputError, match="q exists already"):
        export_checked(checkpoint, tmp_path / "q", "safetensors", options)


def test_an_export_that_does_not_open_is_named(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = dense.export(checkpoint, tmp_path / "out")
    _change(tmp_path / "out", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(LmqError, match=r"out is written, but does not open as safetensors: .*layers\.2\.mlp\.up_proj"):
        check_export(checkpoint, report, "safetensors")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(LmqError, match="does not open as safetensors"):
        check_export(checkpoint, report, "safetensors")


def test_a_missing_package_is_named(
    checkpoint: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = dense.export(checkpoint, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "hqq.models.hf.base", None)
    with pytest.raises(InputError, match=r"out is written; the check needs .* hqq.models.hf.base .* `pip install"):
        check_export(checkpoint, report, "hqq")


def test_without_a_tokenizer_prompts_are_random_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    write_small(tiny_llama, tmp_path / "q", "b4g64")
    for file in (tmp_path / "q").glob("tokenizer*"):
        file.unlink()
    _, check = export_checked(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out", "safetensors", {})
    assert check.passed
    assert check.difference.tokens == len(PROMPTS) * (8 + NEW_TOKENS)


def test_another_tokenizer_is_found(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = dense.export(checkpoint, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:3]
    file.write_text(json.dumps(content))
    assert check_export(checkpoint, report, "safetensors").failures == (
        "the export's tokenizer does not give the tokens of the checkpoint's for the prompts",
    )
    file.write_text("{}")
    with pytest.raises(LmqError, match="out is written, but its tokenizer does not open: "):
        check_export(checkpoint, report, "safetensors")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_full_disk_leaves_nothing(tiny_llama: Path, tmp_path: Path, format_name: str) -> None:
    """Files may grow to 60 kB here: each format fails while it writes its weights."""
    checkpoint = write_small(tiny_llama, tmp_path / "q", "b4g32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(LmqError, match=r"the export could not be written to .* nothing of it is left\. See that"):
            export_checked(checkpoint, tmp_path / "out", format_name, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_formats_are_known_by_name() -> None:
    assert list(FORMATS) == ["safetensors", "hqq", "gguf", "compressed-tensors", "gptq", "auto-round", "awq"]
    for format_ in FORMATS.values():
        exporter = format_.exporter()
        assert callable(exporter.problems)
        assert callable(exporter.export)
    with pytest.raises(InputError, match="unknown export format 'ggml'; did you mean 'gguf'"):
        export_format("ggml")
