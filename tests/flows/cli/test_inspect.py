"""`lmq inspect`: modules and sizes, and what is no model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from lmq_flows.cli import main
from lmq_flows.run.plan import check_run
from tests.conftest import TINY_SHAPE
from tests.flows.cli.conftest import refusal
from tests.flows.conftest import tiny_config
from tests.mixtures import mixture
from tests.vision_language import save_vision_language_model


def test_inspect_shows_modules_and_sizes(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_llama), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 4 layers, hidden size 64" in printed
    assert "mlp.down_proj" in printed
    assert "b2g128" in printed


def test_what_a_hybrid_keeps_is_said_by_inspect_and_before_a_run(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "block_ff_dim": 128}
    config = AutoConfig.for_model("lfm2", **{**TINY_SHAPE, "num_hidden_layers": 2, **options})
    model = shutil.copytree(tiny_llama, tmp_path / "lfm2")
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert main(["inspect", str(model), "--store", str(tmp_path / "store")]) == 0
    assert "of these, in the blocks: conv.conv.weight [64, 1, 3] of layer 0" in capsys.readouterr().out
    notes = check_run(tiny_config(model, tmp_path, strategies=["uniform"]))
    assert notes == ["tiny keeps conv.conv.weight [64, 1, 3] of layer 0 as it is"]


def test_what_lies_beside_a_language_model_is_said_by_inspect_and_before_a_run(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "llava")
    save_vision_language_model("llava", model)
    assert main(["inspect", str(model), "--store", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "LlavaForConditionalGeneration: 2 layers, hidden size 64" in printed
    assert "of these, beside the language model: model.vision_tower (" in printed
    assert "of these, beside the language model: model.multi_modal_projector (6,272 weights, 0.0 MB)" in printed
    notes = check_run(tiny_config(model, tmp_path, strategies=["uniform"]))
    assert [note.partition(" (")[0] for note in notes] == [
        "tiny keeps model.vision_tower",
        "tiny keeps model.multi_modal_projector",
    ]


def test_inspect_refuses_what_is_no_model(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", tmp_path / "store"]
    assert "there is no model directory" in refusal(capsys, "inspect", tmp_path / "model", *store)
    assert "must not be empty" in refusal(capsys, "inspect", "", *store)
    assert "is quantized already (lmq)" in refusal(capsys, "inspect", made[1], *store)
    assert "is a file, not a directory" in refusal(capsys, "inspect", made[1], "--store", made[0])


def test_inspect_shows_experts_and_routers(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "mixture")
    mixture("qwen2-moe").save_pretrained(model)
    assert main(["inspect", str(model), "--store", str(tmp_path / "store")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"mlp\.experts\.\*\.gate_up_proj │ mlp_gate │ 128 × 64 │ 2 layers × 4 experts │ 65,536 │ routed", printed
    )
    assert re.search(r"mlp\.shared_expert\.down_proj │ mlp_down │ 64 × 128 │ 2 │ 16,384 │ all", printed)
    assert "of these, in the blocks: router mlp.gate.weight [4, 64] of layers 0-1" in printed
    assert "of these, in the blocks: router mlp.shared_expert_gate.weight [1, 64] of layers 0-1" in printed
