import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lmq.model.discovery import discover
from lmq.model.structure import PARTS, ModelStructure, ModuleId


@pytest.fixture
def structure(tiny_qwen: Path) -> ModelStructure:
    return discover(tiny_qwen, weights_sha256="0")


def test_json_gives_back_the_same_structure(structure: ModelStructure) -> None:
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


def test_modules_are_those_of_the_model(tiny_model: Path) -> None:
    structure = discover(tiny_model, weights_sha256="0")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for module in structure.modules:
        weight = model.get_submodule(structure.path(module.id)).weight
        assert tuple(weight.shape) == (module.out_features, module.in_features)
        assert weight.numel() == module.parameters
        assert module.part in PARTS
    assert structure.parameters + structure.other_parameters == sum(p.numel() for p in model.parameters())


def test_layers_and_kinds_keep_the_order_of_the_model(structure: ModelStructure) -> None:
    in_layer = structure.in_layer(2)
    assert [module.id for module in in_layer] == [ModuleId(2, kind) for kind in structure.kinds]
    assert len(in_layer) * structure.layers == len(structure.modules)
    assert structure.kinds[:4] == tuple(f"self_attn.{name}_proj" for name in "qkvo")


def test_modules_are_named_for_people_and_for_the_model(structure: ModelStructure) -> None:
    module = ModuleId(3, "mlp.up_proj")
    assert str(module) == "layer 3 mlp.up_proj"
    assert structure.path(module) == "model.layers.3.mlp.up_proj"
