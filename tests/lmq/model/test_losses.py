from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, SwinConfig, SwinForImageClassification

import lmq
from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError, UnsupportedModel
from lmq.evaluation.windows import last_states
from lmq.export import write_export
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.measurement.sequence_fisher import sampled_loss_gradient
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.quantizers import quantizer
from tests.towers import CLASSES, ENCODERS, IMAGE, make_encoder


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / request.param, request.param)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def whole(path: Path, structure: ModelStructure) -> Any:
    opened_by = AutoModel if structure.loss == "embedding" else AutoModelForImageClassification
    return opened_by.from_pretrained(path, dtype=torch.float32).eval()


def outputs(model: Any, structure: ModelStructure, given: Tensor) -> Tensor:
    found = model(given)
    if structure.loss == "embedding":
        return found.pooler_output / found.pooler_output.norm(dim=1, keepdim=True)
    return found.logits


def test_structure_says_what_the_model_is_judged_by(encoder: Path) -> None:
    structure = discover(encoder)
    base = encoder.name == "dinov2-base"
    assert structure.loss == ("embedding" if base else "classification")
    assert structure.vocabulary_size == (64 if base else CLASSES)
    assert structure.layers == 3
    assert ModelStructure.from_json(structure.to_json()) == structure
    parts = {info.id.kind: info.part for info in structure.in_layer(1)}
    attention = {f"attention.{name}_proj": "attn_in" for name in "qkv"} | {"attention.o_proj": "attn_out"}
    swiglu = {"mlp.gate_proj": "mlp_gate", "mlp.up_proj": "mlp_gate", "mlp.down_proj": "mlp_down"}
    assert parts == attention | (swiglu if base else {"mlp.fc1": "mlp_gate", "mlp.fc2": "mlp_down"})
    assert dry_run(encoder, structure) == ()


def test_blocks_one_by_one_give_what_transformers_gives(encoder: Path) -> None:
    structure = discover(encoder)
    model = StreamedModel.open(encoder, structure)
    given = images(5)
    found = model.head_logits(last_states(model, given))
    with torch.no_grad():
        torch.testing.assert_close(found, outputs(whole(encoder, structure), structure, given), atol=1e-5, rtol=1e-5)


def test_gradient_of_the_labels_is_that_of_the_whole_model(encoder: Path) -> None:
    structure = discover(encoder)
    model = StreamedModel.open(encoder, structure)
    given, labels = images(4), torch.tensor([3, 1, 4, 1])
    states = last_states(model, given)
    if structure.loss == "embedding":
        with pytest.raises(InputError, match="predicts no labels"):
            model.loss_gradient(states, labels)
        return
    opened = whole(encoder, structure)
    kept: list[Tensor] = []
    opened.get_submodule(structure.layers_path)[-1].register_forward_hook(
        lambda _, __, output: kept.append(output) or output.retain_grad()
    )
    loss = nn.functional.cross_entropy(opened(given.requires_grad_()).logits, labels, reduction="sum")
    loss.backward()
    found = model.loss_gradient(states, labels)
    assert found.loss_sum == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found.gradient, kept[0].grad, atol=1e-6, rtol=1e-4)


def test_drawn_labels_give_the_divergence_to_second_order(encoder: Path) -> None:
    """½ E[⟨g, δ⟩²] is KL(p ‖ p_δ), or 1 − cos of the embeddings, for a small change δ of the last states."""
    structure = discover(encoder)
    model = StreamedModel.open(encoder, structure)
    states = last_states(model, images(3))
    change = 0.02 * torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    before, after = (model.head_logits(each).double() for each in (states, states + change))
    if structure.loss == "embedding":
        expected = 1 - nn.functional.cosine_similarity(before, after)
    else:
        expected = nn.functional.kl_div(after.log_softmax(-1), before.softmax(-1), reduction="none").sum(-1)
    draws = 3000
    gradient = sampled_loss_gradient(model, states, draws=draws, seed=0).view(draws, *states.shape)
    found = 0.5 * (gradient * change).sum((2, 3)).square().mean(0)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0.15, atol=0)


def test_a_checkpoint_opens_and_computes_what_its_blocks_do(encoder: Path, tmp_path: Path) -> None:
    structure = discover(encoder)
    allocation = {info.id: QuantSpec(4, 32) for info in structure.modules}
    write_checkpoint(tmp_path / "q", encoder, structure, allocation, quantizer("hqq"))
    model = StreamedModel.open(encoder, structure)
    blocks = QuantizedBlocks(tmp_path / "q", structure)
    given = images(3)
    expected = model.head_logits(last_states(model, given, blocks.put_in))
    plain = model.head_logits(last_states(model, given))
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    with torch.no_grad():
        for opened in (lmq.load(tmp_path / "q", verify=True), whole(tmp_path / "q", structure)):
            torch.testing.assert_close(outputs(opened, structure, given), expected, atol=1e-4, rtol=1e-4)


def test_exports_are_refused_and_a_plain_model_is_written_by_transformers(encoder: Path, tmp_path: Path) -> None:
    structure = discover(encoder)
    allocation = {info.id: QuantSpec(4, 32) for info in structure.modules}
    write_checkpoint(tmp_path / "q", encoder, structure, allocation, quantizer("hqq"))
    with pytest.raises(InputError, match="sees images, and exports are of language models"):
        write_export(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out", "safetensors", {})
    lmq.load(tmp_path / "q", dense=True).save_pretrained(tmp_path / "plain")
    given = images(3)
    with torch.no_grad():
        expected = outputs(whole(tmp_path / "q", structure), structure, given)
        found = outputs(whole(tmp_path / "plain", structure), structure, given)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_embeddings_of_encoders_are_not_quantized(tmp_path: Path) -> None:
    path = make_encoder(tmp_path / "vit", "vit")
    with pytest.raises(UnsupportedModel, match=r"vit\.embeddings\.patch_embeddings is a .*leave out embeddings"):
        discover(path, embeddings=True)


def test_a_tower_whose_blocks_differ_in_width_is_refused_by_name(tmp_path: Path) -> None:
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4)
    SwinForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModel,
        match=r"swin.encoder.layers.0: none of blocks.0.attention.q_proj, .* leads back to the hidden size 32",
    ):
        dry_run(tmp_path, discover(tmp_path))
