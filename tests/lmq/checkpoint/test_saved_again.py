"""What was opened is saved by `save_pretrained`: packed, or as the plain model that transformers has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import lmq
from lmq.checkpoint.write import write_checkpoint
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.quantizers.rtn import RoundToNearest
from tests.mixtures import MIXTURES, mixture
from tests.vision_language import FAMILIES, vision_language_model

MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    **dict.fromkeys(MIXTURES, mixture),
    **dict.fromkeys(FAMILIES, vision_language_model),
}
TOKENS = torch.arange(5, 21)[None]


def opened(name: str, place: Path) -> Any:
    """The checkpoint of a model, opened; it lies in `place / "made"`."""
    MODELS[name](name).save_pretrained(place / "source")
    structure = discover(place / "source", weights_sha256="0")
    allocation = {info.id: QuantSpec.parse("b4g64") for info in structure.modules}
    write_checkpoint(place / "made", place / "source", structure, allocation, RoundToNearest())
    return lmq.load(place / "made", dtype=torch.float32)


def quantized_layers(model: Any) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_is_saved_and_opens_again(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again = lmq.load(tmp_path / "saved", dtype=torch.float32)
    assert quantized_layers(again) == quantized_layers(model)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_unpacked_model_is_saved_as_the_plain_one_of_transformers(name: str, tmp_path: Path) -> None:
    expected = opened(name, tmp_path)(TOKENS).logits
    dense = lmq.load(tmp_path / "made", dtype=torch.float32, dense=True)
    torch.testing.assert_close(dense(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    source, saved = (load_file(tmp_path / place / "model.safetensors") for place in ("source", "dense"))
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in source.items()}
    plain = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
