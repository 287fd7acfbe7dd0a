"""Towers and projectors beside a language model, found by patterns, and what goes through them as in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lmq
from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError, UnsupportedModel
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.beside import gradients_beside, states_beside
from lmq.model.discovery import discover, left_out
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.unquantized import unquantized_parts
from lmq.quantizers import quantizer
from tests.vision_language import FAMILIES, IMAGE_TOKEN, KEPT_PARTS, image_and_text, save_vision_language_model

MEASURED = ("llava", "idefics3", "smolvlm")
BLOCKS = {
    "llava": ["model.vision_tower.encoder.layers", "model.multi_modal_projector"],
    "idefics3": ["model.vision_model.encoder.layers", "model.connector"],
    "smolvlm": ["model.vision_model.encoder.layers", "model.connector"],
    "gemma3": ["model.vision_tower.encoder.layers"],
    "qwen2-vl": ["model.visual.blocks"],
    "qwen2.5-vl": ["model.visual.blocks"],
}
"""The blocks beside the language model; Gemma's projector has no nn.Linear, and Qwen's lies outside of the blocks."""


def everything(family: str) -> list[str]:
    """Patterns that name all that can be quantized."""
    parts = {path for path in KEPT_PARTS[family] if any(blocks.startswith(path) for blocks in BLOCKS[family])}
    return ["*", *(f"{part.removeprefix('model.')}.*" for part in sorted(parts))]


def pair_of(family: str, seed: int = 0) -> dict[str, Tensor]:
    """An image with text as the model takes it, without a mask."""
    return {name: tensor for name, tensor in image_and_text(family, seed).items() if name != "attention_mask"}


def opened(family: str, path: Path) -> tuple[torch.nn.Module, StreamedModel]:
    """The model in transformers and streamed, with all beside its language model to be quantized."""
    model = save_vision_language_model(family, path)
    return model, StreamedModel.open(path, discover(path, weights_sha256="0", beside=everything(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_beside_the_language_model_are_modules_like_others(family: str, tmp_path: Path) -> None:
    model = save_vision_language_model(family, tmp_path)
    plain = discover(tmp_path, weights_sha256="0")
    structure = discover(tmp_path, weights_sha256="0", beside=everything(family))
    assert [tower.layers_path for tower in structure.towers[1:]] == BLOCKS[family]
    assert structure.modules[: len(plain.modules)] == plain.modules  # the layers of the text keep their numbers
    beside = [info for info in structure.modules if info.id.layer in structure.layers_beside]
    linear = {
        f"{path}.{name}"
        for path in BLOCKS[family]
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {structure.path(info.id) for info in beside} == linear
    for info in beside:
        assert model.get_submodule(structure.path(info.id)).weight.shape == (info.out_features, info.in_features)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert structure.source_bytes + structure.other_bytes == stored
    parts = {part.name: part.size_bytes for part in unquantized_parts(tmp_path, structure)}
    assert parts["beside"] == sum(part.size_bytes for part in structure.kept_parts)
    assert parts["beside"] + sum(4 * info.parameters for info in beside) == sum(
        part.size_bytes for part in plain.kept_parts
    )
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    rest = [note for note in structure.kept_beside if note.startswith("the rest of ")]
    assert len(rest) == len(
        {tower.part for tower in structure.towers[1:]} & {part.path for part in structure.kept_parts}
    )
    assert dry_run(tmp_path, structure) == left_out(structure, everything(family)) == ()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_with_its_tower_quantized(family: str, tmp_path: Path) -> None:
    """The whole model says of an image what transformers' own says with the dequantized weights."""
    expected = save_vision_language_model(family, tmp_path / "model")
    structure = discover(tmp_path / "model", weights_sha256="0", beside=everything(family))
    allocation = {info.id: QuantSpec.parse("b3g64") for info in structure.modules}
    write_checkpoint(tmp_path / "quantized", tmp_path / "model", structure, allocation, quantizer=quantizer("hqq"))
    source = expected(**image_and_text(family)).logits
    reader = QuantizedCheckpoint(tmp_path / "quantized")
    for name in reader.specs:
        expected.get_submodule(name).weight.copy_(reader.weight(name))
    right = expected(**image_and_text(family)).logits
    found = lmq.load(tmp_path / "quantized", dtype=torch.float32)(**image_and_text(family)).logits
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, source, rtol=1e-1, atol=1e-1)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    sizes = [QuantSpec.parse("b3g64").size_bytes(info.parameters, info.in_features) for info in structure.modules]
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(sizes) + structure.other_bytes


def test_some_matrices_of_a_tower_are_taken_and_the_others_kept(tmp_path: Path) -> None:
    save_vision_language_model("llava", tmp_path)
    patterns = ["*.mlp.*", "vision_tower.*.mlp.*"]
    structure = discover(tmp_path, weights_sha256="0", beside=patterns)
    assert {info.id.kind for info in structure.in_layer(3)} == {"mlp.fc1", "mlp.fc2"}
    assert {tensor.name for tensor in structure.kept if tensor.layer == 3} == {
        f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")
    }
    left = left_out(structure, patterns)
    assert {module.kind for module in left} == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert {module.layer for module in left} == {0, 1}
    assert "model.multi_modal_projector" in {part.path for part in structure.kept_parts}
    for whole in (["*", "model.vision_tower"], ["*", "*.vision_tower.*"], ["*", "*vision_tower*"]):
        assert len(discover(tmp_path, weights_sha256="0", beside=whole).in_layer(3)) == 6
    assert discover(tmp_path, weights_sha256="0", beside=["*.mlp.*", "*"]).layers == 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["*", "vision_tower.*.c_fc"],
            r"'vision_tower\.\*\.c_fc' matches no matrix in the blocks of model\.vision_tower",
        ),
        (
            ["*", "vision_tower.*.layers.0.*"],
            r"leave model\.vision_tower.*layers\.1 without a matrix; take one of each",
        ),
        (["vision_tower.*"], r"leave layer 0 without a module; .* by a further pattern '\*'"),
        (["*", "audio_tower.*"], r"'audio_tower\.\*' matches nothing of Llava.*, and model\.multi_modal_projector\.\*"),
    ],
)
def test_patterns_that_name_nothing_are_refused(patterns: list[str], message: str, tmp_path: Path) -> None:
    save_vision_language_model("llava", tmp_path)
    with pytest.raises(InputError, match=message):
        left_out(discover(tmp_path, weights_sha256="0", beside=patterns), patterns)


@pytest.mark.parametrize("family", MEASURED)
def test_what_goes_through_blocks_is_what_transformers_has(family: str, tmp_path: Path) -> None:
    """States, and gradients of an arbitrary function of the logits from those at the merged states."""
    model, streamed = opened(family, tmp_path)
    structure, pair = streamed.structure, pair_of(family)
    blocks = {layer: model.get_submodule(structure.block_path(layer)) for layer in structure.layers_beside}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    first: dict[str, Tensor] = {}

    def keep(layer: int, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer] = (args[0], output)

    model.get_submodule(structure.layers_path)[0].register_forward_pre_hook(
        lambda _, args: first.update(merged=args[0])
    )
    for layer, block in blocks.items():
        block.register_forward_hook(lambda _, args, output, layer=layer: keep(layer, args, output))
        block.requires_grad_(True)
    logits = model(**pair).logits
    weights = torch.randn(2, *logits.shape[1:], generator=torch.Generator().manual_seed(3))
    wanted = [first["merged"], *(seen[layer][1] for layer in blocks)]
    expected = [
        torch.autograd.grad((logits[0] * draw).sum(), wanted, retain_graph=True, allow_unused=True) for draw in weights
    ]
    with streamed.with_beside():
        states = states_beside(streamed, pair)
        gradients = gradients_beside(streamed, pair, torch.stack([draw[0][0] for draw in expected]))
    assert states.keys() == gradients.keys() == set(structure.layers_beside)
    unused = 0
    for place, layer in enumerate(blocks, 1):
        torch.testing.assert_close(states[layer], seen[layer][0], rtol=1e-4, atol=1e-5)
        for found, draw in zip(gradients[layer], expected, strict=True):
            unused += draw[place] is None
            of_block = torch.zeros_like(seen[layer][1]) if draw[place] is None else draw[place]
            torch.testing.assert_close(found, of_block, rtol=1e-3, atol=1e-5)
    assert unused == (2 if family == "llava" else 0)  # LLaVA looks at what leaves the block before its last
    beside = [streamed._model.get_submodule(path) for path in KEPT_PARTS[family]]
    assert {p.untyped_storage().nbytes() for module in beside for p in module.parameters()} == {4}  # released


def test_blocks_that_take_more_than_states_are_refused_by_name(tmp_path: Path) -> None:
    """A mask of padded images, which Idefics3 makes of the pixels that the processor padded."""
    _, streamed = opened("idefics3", tmp_path)
    pair = pair_of("idefics3")
    mask = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    mask[..., 14:] = False
    with streamed.with_beside(), pytest.raises(UnsupportedModel, match=r"layers\.0 of .* takes more than states"):
        states_beside(streamed, pair | {"pixel_attention_mask": mask})


def test_states_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    _, streamed = opened("llava", tmp_path)
    pair = pair_of("llava")
    pair["input_ids"] = pair["input_ids"].masked_fill(pair["input_ids"] == IMAGE_TOKEN, 5)
    del pair["pixel_values"]
    with streamed.with_beside(), pytest.raises(UnsupportedModel, match="is called 0 times for an image"):
        states_beside(streamed, pair)
