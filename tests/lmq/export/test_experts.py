"""Mixtures of experts in other programs' forms: a plain model holds them, the others say that they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmq
from lmq.allocation.targets import restrict_menu, target_named
from lmq.errors import InputError
from lmq.export import FORMATS
from lmq.formats.spec import STOPS
from lmq.model.discovery import discover
from tests.lmq.export.small_checkpoints import logits, write_small
from tests.mixtures import MIXTURES, mixture


@pytest.mark.parametrize("family", MIXTURES)
def test_a_plain_model_of_a_mixture(family: str, tmp_path: Path) -> None:
    mixture(family).save_pretrained(tmp_path / "model")
    checkpoint = write_small(tmp_path / "model", tmp_path / "q", "b4g64", "b3g32", "b8g64")
    report = FORMATS["safetensors"].exporter().export(checkpoint, tmp_path / "out")
    assert report.steps.keys() == checkpoint.specs.keys()
    opened, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(found.values()), found
    torch.testing.assert_close(logits(opened), logits(lmq.load(tmp_path / "q", dense=True)), rtol=1e-4, atol=1e-4)
    structure = discover(tmp_path / "out")
    assert {structure.path(info.id) for info in structure.modules} == checkpoint.specs.keys()


@pytest.mark.parametrize("name", ["hqq", "compressed-tensors", "gguf"])
def test_other_programs_are_not_given_experts(name: str, tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "model")
    checkpoint = write_small(tmp_path / "model", tmp_path / "q", "b4g64")
    with pytest.raises(InputError, match="mixtral" if name == "gguf" else r"expert"):
        FORMATS[name].exporter().export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_targets_refuse_experts_before_anything_is_measured(target: str, tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path)
    modules = discover(tmp_path).modules
    with pytest.raises(InputError, match=r"no mixtures of experts \(layer 0 mlp\.experts\.0\.gate_up_proj and 15 more"):
        restrict_menu(STOPS, target_named(target), modules)
