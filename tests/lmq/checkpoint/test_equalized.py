"""Copies with rescaled channels compute what the model does, and are easier to quantize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from lmq.checkpoint.equalized import write_equalized
from lmq.errors import InputError, UnsupportedModel
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import quantize_modules
from lmq.model.discovery import discover
from lmq.quantizers import quantizer
from tests.channels import scale_channels_apart

TOKENS = torch.randint(2, 500, (4, 32), generator=torch.Generator().manual_seed(3))
HELD_OUT = torch.randint(2, 500, (4, 32), generator=torch.Generator().manual_seed(4))


def opened(path: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_copy_computes_the_same_with_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    groups = write_equalized(
        tiny_model, discover(tiny_model), TOKENS, tmp_path / "copy", least_fall=0, advance=shares.append
    )
    ours, theirs = opened(tmp_path / "copy"), opened(tiny_model)
    expected = theirs(HELD_OUT).logits
    assert float((ours(HELD_OUT).logits - expected).norm() / expected.norm()) < 1e-5
    changed = [name for name, value in ours.state_dict().items() if not torch.equal(value, theirs.state_dict()[name])]
    assert groups >= 2 * 4
    assert len(changed) >= 2 * groups  # a source and a taker of every group
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


@torch.no_grad()
def test_16_bits_stay_16_bits(tiny_qwen: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    write_equalized(tmp_path / "half", discover(tmp_path / "half"), TOKENS, tmp_path / "copy", least_fall=0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto")
    assert {value.dtype for value in again.state_dict().values()} == {torch.bfloat16}
    expected, found = model.float()(HELD_OUT).logits, again.float()(HELD_OUT).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03


@torch.no_grad()
def rounded(path: Path) -> AutoModelForCausalLM:
    """A model with the matrices of its blocks rounded to nearest at 4 bits in groups of 64."""
    model, structure, spec = opened(path), discover(path), QuantSpec(4, 64)
    weights = {module.id: model.get_submodule(structure.path(module.id)).weight for module in structure.modules}
    for module, grids in quantize_modules(weights, [spec], quantizer("rtn")).items():
        weights[module].copy_(grids[spec].round_trip(weights[module]))
    return model


@torch.no_grad()
def test_channels_of_different_sizes_lose_less_when_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    """The same function with channels of its norms and values scaled apart, as trained models have them."""
    model = opened(tiny_llama)
    scale_channels_apart(model)
    model.save_pretrained(tmp_path / "apart")
    assert write_equalized(tmp_path / "apart", discover(tmp_path / "apart"), TOKENS, tmp_path / "copy") >= 2 * 4
    expected = model(HELD_OUT).logits
    apart, equalized = (
        float((rounded(tmp_path / name)(HELD_OUT).logits - expected).square().mean()) for name in ("apart", "copy")
    )
    assert equalized < 0.7 * apart


def test_channels_that_gain_little_stay(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Random matrices between channels of one size."""
    assert write_equalized(tiny_llama, discover(tiny_llama), TOKENS, tmp_path / "copy") == 0
    assert "the copy is the model itself" in caplog.text
    ours, theirs = opened(tmp_path / "copy").state_dict(), opened(tiny_llama).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_cannot_be_equalized_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModel, match="sees images"):
        write_equalized(tmp_path / "vit", discover(tmp_path / "vit"), TOKENS, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_equalized(tiny_llama, discover(tiny_llama), TOKENS, tmp_path / "there")
