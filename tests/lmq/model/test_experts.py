"""Mixtures of experts against the same models of plain transformers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lmq
from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.write import quantized_bytes, write_checkpoint
from lmq.errors import InputError, UnsupportedModel
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.experts import split_experts
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId
from lmq.model.tensors import read_tensors
from lmq.quantizers import quantizer
from tests.mixtures import EXPERTS, MIXTURES, mixture, put_weights

TOKENS = torch.arange(20, 68).view(2, 24)
SPECS = [QuantSpec.parse(name) for name in ("b4g64", "b3g32", "b8g64")]


@pytest.fixture(params=MIXTURES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(family: str, tmp_path: Path) -> Path:
    mixture(family).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def streamed_logits(path: Path, structure: ModelStructure) -> torch.Tensor:
    model = StreamedModel.open(path, structure)
    hidden, inputs = model.embed(TOKENS), model.block_inputs(TOKENS.shape[1])
    for layer in range(structure.layers):
        with model.block(layer) as block, torch.no_grad():
            hidden = torch.cat([inputs[layer].run(block, row) for row in hidden.split(1)])
    return model.head_logits(hidden).detach()


def allocation_of(structure: ModelStructure) -> dict[ModuleId, QuantSpec]:
    """Every configuration in turn, so that experts of one layer differ."""
    return {info.id: SPECS[number % 3] for number, info in enumerate(structure.modules)}


def test_every_expert_is_a_module(family: str, saved: Path) -> None:
    structure = discover(saved)
    experts = EXPERTS.get(family, 4)
    in_last = [info for info in structure.in_layer(structure.layers - 1) if ".experts." in info.id.kind]
    assert [info.part for info in in_last] == ["mlp_gate", "mlp_down"] * experts
    assert {int(info.id.kind.split(".experts.")[1].split(".")[0]) for info in in_last} == set(range(experts))
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    stored = sum(tensor.numel() for tensor in plain.state_dict().values())
    assert structure.parameters + structure.other_parameters == stored
    assert structure.source_bytes + structure.other_bytes == 4 * stored
    routers = [tensor for tensor in structure.kept if tensor.shape == (experts, 64)]
    assert [tensor.layer for tensor in routers] == sorted(
        {i.id.layer for i in structure.modules if ".experts." in i.id.kind}
    )
    shared = {kind.rsplit(".", 1)[0] for kind in structure.kinds if "shared" in kind}
    assert bool(shared) == (family in ("qwen2-moe", "deepseek-v2", "deepseek-v3", "granite-moe-shared"))
    assert not any("shared_expert_gate" in kind for kind in structure.kinds)
    assert ModelStructure.from_json(structure.to_json()) == structure
    assert dry_run(saved, structure) == ()


def test_weights_and_logits_are_those_of_transformers(family: str, saved: Path) -> None:
    structure = discover(saved)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        expected = plain(TOKENS).logits
    torch.testing.assert_close(streamed_logits(saved, structure), expected, rtol=1e-4, atol=1e-4)
    for layer in range(structure.layers):
        for kind, weight in load_layer_weights(saved, structure, layer).items():
            before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
            put_weights(plain, {structure.path(ModuleId(layer, kind)): weight})
            assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


def test_checkpoints_open_and_compute_what_plain_transformers_does_with_their_weights(
    family: str, saved: Path, tmp_path: Path
) -> None:
    structure = discover(saved)
    allocation = allocation_of(structure)
    path = tmp_path / "checkpoint"
    write_checkpoint(path, saved, structure, allocation, quantizer("rtn"))
    predicted = sum(allocation[info.id].size_bytes(info.parameters) for info in structure.modules)
    assert quantized_bytes(path) == predicted
    opened = AutoModelForCausalLM.from_pretrained(path)
    packed = {name: module for name, module in opened.named_modules() if isinstance(module, QuantizedLinear)}
    assert set(packed) == {structure.path(info.id) for info in structure.modules}
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        before = plain(TOKENS).logits
    put_weights(plain, {name: module.dequantize() for name, module in packed.items()})
    with torch.no_grad():
        expected = plain(TOKENS).logits
        assert (expected - before).norm() > 0.01 * before.norm()
        for model in (opened, lmq.load(path), lmq.load(path, dense=True)):
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_only_routed_experts_are_unpacked(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = discover(saved)
    write_checkpoint(tmp_path / "checkpoint", saved, structure, allocation_of(structure), quantizer("rtn"))
    model = lmq.load(tmp_path / "checkpoint")
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(TOKENS[:1, :1])  # one token goes to two experts of a layer
    for layer in {info.id.layer for info in structure.modules if ".experts." in info.id.kind}:
        prefix = f"{structure.layers_path}.{layer}."
        used = [name for name in called if name.startswith(prefix) and ".experts." in name]
        assert len(used) == 4


def saved_mixtral(tmp_path: Path) -> Path:
    mixture("mixtral").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_experts_of_a_layer_go_together(tmp_path: Path) -> None:
    path = saved_mixtral(tmp_path)
    structure = discover(path)
    allocation = allocation_of(structure)
    left_out = ModuleId(1, "mlp.experts.2.down_proj")
    del allocation[left_out]
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight is left out"):
        write_checkpoint(tmp_path / "checkpoint", path, structure, allocation, quantizer("rtn"))
    assert not (tmp_path / "checkpoint").exists()


def test_one_expert_is_read_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = discover(saved)
    layer = max(structure.experts)
    whole = load_layer_weights(saved, structure, layer)
    read: set[str] = set()

    def noted(tensors):
        found = list(tensors)
        read.update(tensor.name for tensor in found)
        return read_tensors(found)

    monkeypatch.setattr("lmq.model.stored.read_tensors", noted)
    for number in range(structure.experts[layer]):
        kinds = {kind for kind in whole if f".experts.{number}." in kind}
        weights = load_layer_weights(saved, structure, layer, kinds)
        assert weights.keys() == kinds
        assert all(torch.equal(weight, whole[kind]) for kind, weight in weights.items())
        others = {name for name in read if re.search(r"\.experts\.\d+\.", name) and f".experts.{number}." not in name}
        assert not others
        read.clear()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = saved_mixtral(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts\.down_proj needs 4 .* 3"):
        discover(path)


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    path = saved_mixtral(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name][:, :64].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts\.down_proj of shape \[4, 64, 128\]"):
        discover(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: setattr(e, "gate_up_proj", nn.Parameter(torch.zeros(4, 100, 64))), r"gate_up_proj .*\[256, 64\]"),
        (lambda e: setattr(e, "down_proj", nn.Parameter(torch.zeros(3, 64, 128))), r"down_proj .*4 experts"),
        (lambda e: e.register_parameter("extra", nn.Parameter(torch.zeros(3, 3, 3))), "extra"),
        (lambda e: setattr(e, "has_post_expert_norm", True), "norm"),
        (lambda e: setattr(e, "has_bias", True), "biases"),
    ],
)
def test_other_layouts_are_refused_by_name(change, message: str) -> None:
    model = mixture("mixtral")
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts.*" + message):
        split_experts(model)
