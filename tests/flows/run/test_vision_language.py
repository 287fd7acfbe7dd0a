"""A whole run of a vision-language model: its language model is measured and quantized, and it is opened whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import lmq
from lmq.export.source import QuantizedCheckpoint
from lmq.model.discovery import discover
from lmq.report.results import read_results
from lmq_flows.cli import main
from tests.flows.conftest import run_and_look, tiny_config
from tests.vision_language import image_and_text, save_vision_language_model


@pytest.fixture(scope="module")
def finished(server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("vision")
    model = shutil.copytree(tiny_llama, place / "model")  # its tokenizer
    save_vision_language_model("qwen2-vl", model)
    config = tiny_config(
        model,
        place,
        strategies=["uniform", "loss-aware"],
        measure={"quantizer": "fisher-gptq", "menu": ["b2g64", "b3g64", "b4g64", "b8g64"]},
        embeddings=True,
    )
    return config, model, run_and_look(config)


def test_predicted_bytes_count_what_is_kept(finished) -> None:
    config, model, done = finished
    assert done.state.is_completed()
    structure = discover(model, embeddings=True)
    visual = {name for name in load_file(model / "model.safetensors") if "visual." in name}
    for result in read_results(config.run_dir / "results.json")[1:]:
        assert result.error is None
        tensors = load_file(config.run_dir / result.checkpoint / "model.safetensors")
        assert visual <= tensors.keys()
        stored = sum(tensor.nbytes for tensor in tensors.values())
        assert stored == result.size_bytes + structure.other_bytes
        assert result.size_bytes <= result.budget_bytes


@torch.no_grad()
def test_the_checkpoint_says_of_an_image_what_its_weights_make(finished) -> None:
    config, model, _ = finished
    path = config.run_dir / read_results(config.run_dir / "results.json")[-1].checkpoint
    expected = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    reader = QuantizedCheckpoint(path)
    for name in reader.specs:
        expected.get_submodule(name).weight.copy_(reader.weight(name))
    opened = lmq.load(path, dtype=torch.float32)
    assert type(opened) is Qwen2VLForConditionalGeneration
    inputs = image_and_text("qwen2-vl")
    torch.testing.assert_close(opened(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_it_is_evaluated_beside_its_source(finished, capsys: pytest.CaptureFixture[str]) -> None:
    config, model, _ = finished
    checkpoint = config.run_dir / read_results(config.run_dir / "results.json")[-1].checkpoint
    options = ["--tokens", "256", "--window", "64", "--stride", "32"]
    assert main(["evaluate", str(checkpoint), "--reference", str(model), *options]) == 0
    assert "KL to the reference" in capsys.readouterr().out
