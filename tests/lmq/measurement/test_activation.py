import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import NotFiniteError
from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import part_sensitivities, part_sensitivity_table
from lmq.measurement.grids import fit_grids
from lmq.model.block_inputs import BlockInputs
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import PARTS, ModuleId, ModuleInfo
from lmq.quantizers import quantizer

SEQUENCES, LENGTH, LAYER = 3, 24, 1
SPEC = QuantSpec(3, 64)


def open_streamed(path: Path) -> StreamedModel:
    return StreamedModel.open(path, discover(path, weights_sha256="0"))


def quantized_weights(block: nn.Module) -> dict[str, Tensor]:
    return {
        kind: fit_grids(module.weight, [SPEC], quantizer("rtn"))[SPEC].round_trip(module.weight)
        for kind, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def entering_states(model: PreTrainedModel) -> Tensor:
    token_ids = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    kept: list[Tensor] = []
    handle = model.get_submodule(f"model.layers.{LAYER}").register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    with torch.no_grad():
        model(token_ids)
    handle.remove()
    return kept[0]


@torch.no_grad()
def plain_error(model: PreTrainedModel, judged: str, kinds: list[str], quantized: dict[str, Tensor]) -> float:
    """Error of a copy of `judged` with other weights, called as the plain model calls it, all sequences at once."""
    block = model.get_submodule(f"model.layers.{LAYER}")
    calls: list[tuple[Any, Any, Any]] = []
    handle = block.get_submodule(judged).register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    model(torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)), use_cache=False)
    handle.remove()
    changed = copy.deepcopy(block)
    for kind in kinds:
        changed.get_submodule(kind).weight.copy_(quantized[kind])
    args, kwargs, expected = calls[0]
    found = changed.get_submodule(judged)(*args, **kwargs)
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    return (found.double() - expected.double()).square().mean().item()


def test_scores_equal_those_of_a_plain_model_with_other_weights(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    streamed = open_streamed(tiny_model)
    modules = streamed.structure.in_layer(LAYER)
    by_part = {part: [module.id.kind for module in modules if module.part == part] for part in PARTS}
    with streamed.block(LAYER) as block:
        quantized = quantized_weights(block)
        scores = part_sensitivities(
            block, streamed.block_inputs(LENGTH)[LAYER], entering_states(plain), modules, quantized
        )
    judged = {"attn_in": "self_attn", "attn_out": "self_attn.o_proj", "mlp_gate": "mlp", "mlp_down": "mlp.down_proj"}
    assert scores.keys() == set(PARTS)
    for part, kinds in by_part.items():
        expected = plain_error(plain, judged[part], kinds, quantized)
        assert expected > 0
        assert scores[part] == pytest.approx(expected, rel=1e-4), part


def test_every_module_has_the_score_of_its_part(tiny_model: Path) -> None:
    streamed = open_streamed(tiny_model)
    hidden = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    inputs = streamed.block_inputs(LENGTH)
    for layer in range(streamed.structure.layers):
        modules = streamed.structure.in_layer(layer)
        with streamed.block(layer) as block:
            scores = part_sensitivities(block, inputs[layer], hidden, modules, quantized_weights(block))
        assert all(scores[module.part] > 0 for module in modules)


def test_unquantized_weights_have_no_error_and_nothing_is_changed(tiny_qwen: Path) -> None:
    streamed = open_streamed(tiny_qwen)
    hidden = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    modules = streamed.structure.in_layer(LAYER)
    with streamed.block(LAYER) as block:
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        same = {module.id.kind: block.get_submodule(module.id.kind).weight for module in modules}
        inputs = streamed.block_inputs(LENGTH)[LAYER]
        assert part_sensitivities(block, inputs, hidden, modules, same) == dict.fromkeys(PARTS, 0.0)
        part_sensitivities(block, inputs, hidden, modules, quantized_weights(block))
        assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
        assert not any(module._forward_hooks for module in block.modules())


def test_weights_that_are_not_finite_name_part_and_layer(tiny_llama: Path) -> None:
    streamed = open_streamed(tiny_llama)
    hidden = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    with streamed.block(LAYER) as block:
        quantized = quantized_weights(block)
        quantized["mlp.up_proj"][3, 5] = torch.nan
        with pytest.raises(NotFiniteError, match="output error of mlp_gate in layer 1 is nan"):
            part_sensitivities(
                block, streamed.block_inputs(LENGTH)[LAYER], hidden, streamed.structure.in_layer(LAYER), quantized
            )


class BlockWithoutMlp(nn.Module):
    """A block whose feed-forward matrices are its own, as in OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.fc2(self.fc1(hidden).relu())


@torch.no_grad()
def test_modules_of_the_block_itself_are_judged_by_the_output_of_the_block(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    block = BlockWithoutMlp()
    hidden = torch.randn(2, 5, 8)
    modules = [ModuleInfo(ModuleId(0, "fc1"), 16, 8, "mlp_gate"), ModuleInfo(ModuleId(0, "fc2"), 8, 16, "mlp_down")]
    quantized = {"fc1": block.fc1.weight.round(decimals=1), "fc2": block.fc2.weight.round(decimals=1)}
    inputs = BlockInputs((), {}, torch.device("cpu"), torch.float32)
    with caplog.at_level(logging.WARNING):
        scores = part_sensitivities(block, inputs, hidden, modules, quantized)
    assert "layer 0 has no attn_in and no attn_out" in caplog.text
    changed = copy.deepcopy(block)
    changed.fc1.weight.copy_(quantized["fc1"])
    assert scores["mlp_gate"] == pytest.approx((changed(hidden) - block(hidden)).square().mean().item(), rel=1e-5)
    inner = block.fc1(hidden).relu()
    error = inner @ (quantized["fc2"] - block.fc2.weight).t()
    assert scores["mlp_down"] == pytest.approx(error.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_all_configurations_at_once_have_the_scores_of_each(
    tiny_model: Path, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmq.measurement.activation._TOKENS_AT_ONCE", 2 * LENGTH)
    streamed = open_streamed(tiny_model)
    hidden = torch.randn(SEQUENCES, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    modules = streamed.structure.in_layer(LAYER)
    inputs = streamed.block_inputs(LENGTH)[LAYER]
    with streamed.block(LAYER) as block:
        weights = {module.id.kind: block.get_submodule(module.id.kind).weight.clone() for module in modules}
        menu = [QuantSpec(2, 32), SPEC, QuantSpec(8, 32)]
        grids = {kind: fit_grids(weight, menu, quantizer("rtn")) for kind, weight in weights.items()}
        quantized = {
            spec: {kind: grids[kind][spec].round_trip(weight) for kind, weight in weights.items()} for spec in menu
        }
        makers = {spec: quantized[spec].__getitem__ for spec in menu}
        table = part_sensitivity_table(block, inputs, hidden, modules, makers, dtype)
        assert list(table) == menu
        for spec in menu:
            expected = part_sensitivities(block, inputs, hidden, modules, quantized[spec])
            assert table[spec] == pytest.approx(expected, rel=tolerance), spec
        assert not any("forward" in vars(module) for module in block.modules())


def test_parts_of_one_module_are_scored_alike_by_moments_and_by_replay(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = open_streamed(tiny_model)
    hidden = torch.randn(SEQUENCES, LENGTH, 64, generator=torch.Generator().manual_seed(2))
    modules = streamed.structure.in_layer(LAYER)
    inputs = streamed.block_inputs(LENGTH)[LAYER]
    scores = []
    with streamed.block(LAYER) as block:
        quantized = quantized_weights(block)
        for least_gain in (0.0, torch.inf):
            monkeypatch.setattr("lmq.measurement.activation._LEAST_GAIN", least_gain)
            scores.append(part_sensitivities(block, inputs, hidden, modules, quantized))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0]["mlp_down"] != scores[1]["mlp_down"]  # sums in another order: these are two ways
