"""A checkpoint of a vision-language model is the whole of it, and says of an image what it should."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

import lmq
from lmq.checkpoint.write import write_checkpoint
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.quantizers.rtn import RoundToNearest
from tests.vision_language import FAMILIES, KEPT_PARTS, image_and_text, save_vision_language_model

SPEC = QuantSpec.parse("b3g64")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def quantized(family: str, place: Path) -> tuple[PreTrainedModel, Path]:
    """The model with the weights of its checkpoint put in by hand, and the checkpoint."""
    source, path = place / "source", place / "checkpoint"
    model = save_vision_language_model(family, source)
    for name in PROCESSOR_FILES:
        (source / name).write_text(json.dumps({"file": name}))
    structure = discover(source, weights_sha256="0")
    write_checkpoint(path, source, structure, {info.id: SPEC for info in structure.modules}, RoundToNearest())
    reader = QuantizedCheckpoint(path)
    with torch.no_grad():
        for name in reader.specs:
            model.get_submodule(name).weight.copy_(reader.weight(name))
    return model, path


def written(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens that the model writes on after an image with text, and their logits."""
    done = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return done.sequences, torch.stack(done.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_generates_from_an_image(family: str, tmp_path: Path) -> None:
    expected, path = quantized(family, tmp_path)
    inputs = image_and_text(family)
    tokens, logits = written(expected, inputs)
    for opened in (
        lmq.load(path, dtype=torch.float32),
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(),
        type(expected).from_pretrained(path, dtype=torch.float32).eval(),
    ):
        assert type(opened) is type(expected)
        assert sum(isinstance(module, QuantizedLinear) for module in opened.modules()) == 2 * 7
        found_tokens, found_logits = written(opened, inputs)
        torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found_tokens, tokens)
    other = image_and_text(family, seed=1)  # the image is looked at
    assert not torch.allclose(written(expected, other)[1], logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["qwen2-vl", "llava"])
def test_what_lies_beside_the_language_model_is_copied_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, path = quantized(family, tmp_path)
    source, found = (load_file(place / "model.safetensors") for place in (tmp_path / "source", path))
    words = [part.rpartition(".")[2] for part in KEPT_PARTS[family]]
    beside = {name for name in source if any(word in name for word in words)}
    assert beside
    assert all(torch.equal(found[name], source[name]) for name in beside)
    for name in PROCESSOR_FILES:
        assert (path / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
