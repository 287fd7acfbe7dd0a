"""Models of two towers, one for images and one for texts, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

import lmq
from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.write import quantized_bytes, write_checkpoint
from lmq.evaluation.windows import last_states
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId
from lmq.quantizers import quantizer
from tests.towers import IMAGE, PAIRS, TEXT, VOCABULARY, make_encoder

IMAGES, TEXTS = 0, 1


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("pair") / request.param, request.param)


def given(tower: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if tower == IMAGES:
        return torch.randn(3, 3, IMAGE, IMAGE, generator=generator)
    ids = torch.randint(2, VOCABULARY, (4, TEXT), generator=generator)
    for row, length in enumerate((5, 16, 9, 12)):
        ids[row, length - 1 :] = 1  # ends there, and is filled up
    return ids


def features(model: Any, tower: int) -> Tensor:
    found = (model.get_image_features, model.get_text_features)[tower](given(tower)).pooler_output
    return found / found.norm(dim=1, keepdim=True)


def test_structure_numbers_the_layers_of_both_towers(pair: Path) -> None:
    structure = discover(pair)
    assert structure.loss == "contrastive"
    assert [tower.layers for tower in structure.towers] == [2, 3]
    assert (structure.layers, structure.layers_of(TEXTS), structure.tower_of(2)) == (5, range(2, 5), TEXTS)
    assert structure.path(ModuleId(1, "mlp.fc1")) == "vision_model.encoder.layers.1.mlp.fc1"
    assert structure.path(ModuleId(3, "mlp.fc1")) == "text_model.encoder.layers.1.mlp.fc1"
    assert {info.in_features for info in structure.in_layer(3)} == {32, 64}
    assert ModelStructure.from_json(structure.to_json()) == structure
    assert dry_run(pair, structure) == ()


@pytest.mark.parametrize("tower", [IMAGES, TEXTS])
def test_each_tower_gives_what_transformers_gives(pair: Path, tower: int) -> None:
    model = StreamedModel.open(pair, discover(pair))
    found = model.head_logits(last_states(model, given(tower), tower=tower), tower, given(tower))
    with torch.no_grad():
        expected = features(AutoModel.from_pretrained(pair, dtype=torch.float32).eval(), tower)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_both_towers_are_quantized_and_open(pair: Path, tmp_path: Path) -> None:
    structure = discover(pair)
    allocation = {info.id: QuantSpec(4 if info.id.layer < 2 else 3, 32) for info in structure.modules}
    write_checkpoint(tmp_path / "q", pair, structure, allocation, quantizer("hqq"))
    sizes = (spec.size_bytes(info.parameters) for info in structure.modules if (spec := allocation[info.id]))
    assert quantized_bytes(tmp_path / "q") == sum(sizes)
    model = StreamedModel.open(pair, structure)
    blocks = QuantizedBlocks(tmp_path / "q", structure)
    for opened in (lmq.load(tmp_path / "q", verify=True), AutoModel.from_pretrained(tmp_path / "q").eval()):
        for tower in (IMAGES, TEXTS):
            states = last_states(model, given(tower), blocks.put_in, tower=tower)
            expected = model.head_logits(states, tower, given(tower))
            with torch.no_grad():
                torch.testing.assert_close(features(opened, tower), expected, atol=1e-4, rtol=1e-3)
