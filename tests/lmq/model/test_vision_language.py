"""The language model of a vision-language model is found, and what lies beside it is kept and counted."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

from lmq.checkpoint.dry_run import dry_run
from lmq.errors import UnsupportedModel
from lmq.model.auto_class import auto_class_of
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.unquantized import unquantized_parts
from tests.vision_language import FAMILIES, IMAGE_TOKEN, KEPT_PARTS, image_and_text, save_vision_language_model

LENGTH = 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_those_of_the_text_and_the_rest_is_counted(family: str, tmp_path: Path) -> None:
    model = save_vision_language_model(family, tmp_path)
    structure = discover(tmp_path, weights_sha256="0")
    assert {part.path for part in structure.kept_parts} == set(KEPT_PARTS[family])
    for part in structure.kept_parts:
        beside = model.get_submodule(part.path)
        assert part.parameters == sum(parameter.numel() for parameter in beside.parameters())
        assert part.size_bytes == 4 * part.parameters
    language_model = model.get_submodule(structure.layers_path.rpartition(".")[0])
    matrices = {f"{structure.path(info.id)}.weight" for info in structure.modules}
    linear = {name for name, module in language_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(matrices) == len(linear) == 2 * 7
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert structure.source_bytes + structure.other_bytes == stored
    parts = {part.name: part for part in unquantized_parts(tmp_path, structure)}
    assert parts["beside"].size_bytes == sum(part.size_bytes for part in structure.kept_parts)
    assert sum(part.size_bytes for part in parts.values()) == structure.other_bytes
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_text_goes_through_the_blocks_as_in_transformers(family: str, tmp_path: Path) -> None:
    """States between the blocks too: positions in three dimensions are equal ones for text. No tower is read."""
    model = save_vision_language_model(family, tmp_path)
    ids = torch.randint(5, 400, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    plain = model(ids, output_hidden_states=True)
    streamed = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    inputs = streamed.block_inputs(LENGTH)
    hidden = streamed.embed(ids)
    for layer in range(2):
        torch.testing.assert_close(hidden, plain.hidden_states[layer], rtol=1e-5, atol=1e-5)
        with streamed.block(layer) as block:
            hidden = inputs[layer].run(block, hidden)
    torch.testing.assert_close(streamed.head_logits(hidden), plain.logits, rtol=1e-4, atol=1e-5)
    beside = [streamed._model.get_submodule(path) for path in KEPT_PARTS[family]]
    assert {p.untyped_storage().nbytes() for module in beside for p in module.parameters()} == {4}


def pair_of(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What `image_and_text` gives, with the types of tokens that Gemma's processor adds, and no mask."""
    inputs = image_and_text(family, seed)
    types = {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()} if family == "gemma3" else {}
    return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"} | types


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_images_with_text_go_through_the_blocks_as_in_transformers(family: str, tmp_path: Path) -> None:
    """Two pairs in a sequence, of which the second is cut, beside one that begins with the second."""
    model = save_vision_language_model(family, tmp_path)
    streamed = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    first, second = pair_of(family, 0), pair_of(family, 1)
    streamed.check_pair(first)
    own = first["input_ids"].shape[1]
    length = own + 7
    hidden = streamed.embed_pairs([(first, second), (second, first)], length)
    both = {
        name: torch.cat([first[name], second[name]], dim=int(name == "input_ids" or first[name].ndim == 5))
        for name in first
    }
    plain = model(**both, output_hidden_states=True)
    alone = model(**second, output_hidden_states=True)
    inputs = streamed.block_inputs(length)
    for layer in range(2):
        torch.testing.assert_close(hidden[:1], plain.hidden_states[layer][:, :length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden[1:, :own], alone.hidden_states[layer], rtol=1e-4, atol=1e-5)
        with streamed.block(layer) as block:
            hidden = inputs[layer].run(block, hidden)
    torch.testing.assert_close(streamed.head_logits(hidden[:1]), plain.logits[:, :length], rtol=1e-4, atol=1e-4)
    beside = [streamed._model.get_submodule(path) for path in KEPT_PARTS[family]]
    assert {p.untyped_storage().nbytes() for module in beside for p in module.parameters()} == {4}  # released


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen2-vl", "Qwen2VL.* gives block 0 another position_embeddings than for text"),
        ("qwen2.5-vl", "Qwen2_5_VL.* another position_embeddings"),
        ("gemma3", "Gemma3.* gives block 0 another attention_mask"),
    ],
)
def test_images_that_change_more_than_states_are_refused_by_name(family: str, why: str, tmp_path: Path) -> None:
    save_vision_language_model(family, tmp_path)
    streamed = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    with pytest.raises(UnsupportedModel, match=f"{why}.*; calibrate it on text"):
        streamed.check_pair(pair_of(family))
    with pytest.raises(UnsupportedModel, match="another"):
        streamed.embed_pairs([(pair_of(family),)], 8)


def test_positions_in_the_embeddings_are_refused(tmp_path: Path) -> None:
    text = {"model_type": "xglm", "vocab_size": 512, "d_model": 64, "ffn_dim": 64, "num_layers": 2}
    text |= {"attention_heads": 4, "max_position_embeddings": 64}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    streamed = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    with pytest.raises(UnsupportedModel, match="embeddings of equal tokens differ from place to place"):
        streamed.check_pair(pair_of("llava"))


def test_a_language_model_has_nothing_beside_it(tiny_model: Path) -> None:
    structure = discover(tiny_model)
    assert structure.kept_parts == ()
    assert "kept_parts" not in structure.to_json()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("gemma3", "AutoModelForCausalLM"),  # the whole model, in either mapping
        ("llava", "AutoModelForImageTextToText"),
        ("qwen2_vl", "AutoModelForImageTextToText"),
    ],
)
def test_a_model_is_opened_whole(kind: str, expected: str) -> None:
    assert auto_class_of(AutoConfig.for_model(kind)).__name__ == expected


@pytest.mark.parametrize(
    ("saved_as", "expected"),
    [
        ("Qwen3_5ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("Qwen3_5ForCausalLM", "AutoModelForCausalLM"),
        (None, "AutoModelForCausalLM"),
    ],
)
def test_of_two_classes_it_is_the_one_that_the_model_was_saved_as(saved_as: str | None, expected: str) -> None:
    config = AutoConfig.for_model("qwen3_5")
    config.architectures = None if saved_as is None else [saved_as]
    assert auto_class_of(config).__name__ == expected


def test_blocks_that_take_the_image_are_refused_by_name(tmp_path: Path) -> None:
    widths = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    text = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], **dict.fromkeys(widths, 64)}
    vision = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0], "max_num_tiles": 1}
    config = transformers.MllamaConfig(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        vision_config={**vision, "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]]},
    )
    transformers.MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    expected = r"layers\.1, a MllamaCrossAttentionDecoderLayer, is left out without an image"
    with pytest.raises(UnsupportedModel, match=expected):
        dry_run(tmp_path, discover(tmp_path, weights_sha256="0"))


def test_text_that_an_encoder_reads_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("florence2")
    config.architectures = ["Florence2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no model of type florence2 that predicts the next token"):
        discover(tmp_path, weights_sha256="0")
