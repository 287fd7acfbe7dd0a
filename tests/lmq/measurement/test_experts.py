"""What is measured of experts, against plain transformers' own and float64 sums over the tokens routed to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import part_sensitivities
from lmq.measurement.base import LayerReplay, Need
from lmq.measurement.expert_tokens import measure_expert_tokens, pooled_experts
from lmq.measurement.expert_traces import ExpertTraces
from lmq.measurement.part_replay import judged_with
from lmq.measurement.pooling import pooled_moments, pooled_traces
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.quantizer_moments import backward_with_moments, input_moments
from lmq.measurement.replay import backward_block, forward_block
from lmq.measurement.sequence_fisher import sequence_loss_changes
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.model.discovery import discover
from lmq.model.experts import RoutedExperts, every_token
from lmq.model.streaming import StreamedModel
from tests.mixtures import mixture

LENGTH, SEQUENCES, LAYER = 24, 4, 1
SPEC = QuantSpec(4, 64)


@dataclass(frozen=True)
class Seen:
    """One layer of a model with what entered it, a gradient at its output for two draws, and plain transformers' own.

    `routed` [tokens, k] are the experts of every token, `entering_experts` [tokens, hidden] what they were given.
    """

    model: StreamedModel
    hidden: Tensor
    gradient: Tensor
    plain_block: torch.nn.Module
    entering_experts: Tensor
    routed: Tensor

    @property
    def inputs(self):
        return self.model.block_inputs(LENGTH)[LAYER]

    @property
    def kinds(self) -> list[str]:
        return [info.id.kind for info in self.model.structure.in_layer(LAYER)]

    def traces(self) -> dict[str, ModuleTrace]:
        with self.model.block(LAYER) as block:
            return trace_modules(block, self.inputs, self.hidden, self.gradient, self.kinds, torch.float32)


@pytest.fixture(params=["mixtral", "deepseek-v3", "gpt-oss"])
def seen(request: pytest.FixtureRequest, tmp_path: Path) -> Seen:
    source = mixture(request.param)
    if request.param == "gpt-oss":  # its router has biases: no token ever goes to the last expert
        with torch.no_grad():
            source.get_submodule(f"model.layers.{LAYER}.mlp.router").bias[3] = -1000.0
    source.save_pretrained(tmp_path)
    model = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SEQUENCES, LENGTH, 64, generator=generator)
    gradient = torch.randn(2 * SEQUENCES, LENGTH, 64, generator=generator)
    block = plain.get_submodule(f"model.layers.{LAYER}")
    given: list[tuple[Tensor, Tensor]] = []
    block.mlp.experts.register_forward_pre_hook(lambda _, args: given.append((args[0].detach(), args[1])))
    inputs = model.block_inputs(LENGTH)[LAYER]
    with torch.no_grad():
        for row in hidden.split(1):
            inputs.run(block, row)
    return Seen(model, hidden, gradient, block, *(torch.cat(parts) for parts in zip(*given, strict=True)))


def fused(seen: Seen, kind: str) -> tuple[Tensor, int]:
    """The parameter of plain transformers that holds a matrix, and its number."""
    path, number, name = kind.rsplit(".", 2)
    return seen.plain_block.get_submodule(path).get_parameter(name), int(number)


def upright(weight: Tensor, kind: str, seen: Seen) -> Tensor:
    """[out_features, in_features] of a slice of a fused parameter."""
    transposed = seen.plain_block.mlp.experts.is_transposed
    return weight.t() if transposed else weight


def experts_of(seen: Seen) -> list[str]:
    return [kind for kind in seen.kinds if ".experts." in kind]


def test_traces_hold_the_tokens_that_are_routed_to_an_expert(seen: Seen) -> None:
    traces = seen.traces()
    for kind in experts_of(seen):
        number = int(kind.split(".experts.")[1].split(".")[0])
        tokens = (seen.routed == number).any(1)
        assert len(traces[kind].inputs) == int(tokens.sum())
        assert traces[kind].lengths == tuple(tokens.view(SEQUENCES, LENGTH).sum(1).tolist())
        assert len(traces[kind].gradients) == 2 * len(traces[kind].inputs)
        if not kind.endswith("down_proj"):
            torch.testing.assert_close(traces[kind].inputs, seen.entering_experts[tokens], rtol=1e-5, atol=1e-5)
    others = [kind for kind in seen.kinds if ".experts." not in kind]
    assert {len(traces[kind].inputs) for kind in others} == {SEQUENCES * LENGTH}


def test_loss_changes_are_inner_products_with_the_gradients_of_plain_transformers(seen: Seen) -> None:
    """⟨∇_W L, E⟩ of every draw and sequence, the gradient taken by the fused parameters."""
    traces = seen.traces()
    generator = torch.Generator().manual_seed(5)
    parameters = {id(fused(seen, kind)[0]): fused(seen, kind)[0] for kind in experts_of(seen)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    expected: dict[str, list[float]] = {kind: [] for kind in experts_of(seen)}
    errors = {}
    for kind in experts_of(seen):
        parameter, number = fused(seen, kind)
        errors[kind] = torch.randn(upright(parameter[number].detach(), kind, seen).shape, generator=generator)
    for draw in range(len(seen.gradient)):
        sequence = draw % SEQUENCES
        leaving = seen.inputs.run(seen.plain_block, seen.hidden[sequence : sequence + 1])
        found = torch.autograd.grad(leaving, list(parameters.values()), seen.gradient[draw : draw + 1])
        by_id = dict(zip(parameters, found, strict=True))
        for kind in expected:
            parameter, number = fused(seen, kind)
            gradient = upright(by_id[id(parameter)][number], kind, seen)
            expected[kind].append(float((gradient * errors[kind]).sum(dtype=torch.float64)))
    for kind, changes in expected.items():
        found_changes = sequence_loss_changes(traces[kind], {SPEC: errors[kind]}, sequence_length=LENGTH)[SPEC]
        assert found_changes.tolist() == pytest.approx(changes, rel=1e-3, abs=1e-3)


def assert_same_trace(found: ModuleTrace, expected: ModuleTrace) -> None:
    assert (found.lengths, found.draws) == (expected.lengths, expected.draws)
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_a_time", ["all experts", "one expert"])
def test_traces_are_taken_expert_by_expert(seen: Seen, at_a_time: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if at_a_time == "one expert":
        monkeypatch.setattr("lmq.model.streaming._EXPERTS_BYTES", 0)
    expected = seen.traces()
    with seen.model.block(LAYER, only_run=True) as block:
        traces = ExpertTraces(block, seen.inputs, seen.hidden, seen.gradient, "mlp.experts")
        found = {kind: trace for number in range(4) for kind, trace in traces.of(number).items()}
    assert found.keys() == set(experts_of(seen))
    for kind, trace in found.items():
        assert_same_trace(trace, expected[kind])


def test_a_block_is_run_with_one_expert_in_memory(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, gradients, traces and moments are those of the whole block; at no time are two experts there."""
    work = (seen.inputs, seen.hidden, seen.gradient, seen.kinds)
    with seen.model.block(LAYER) as block:
        leaving = forward_block(block, seen.inputs, seen.hidden, layer=LAYER)
        entering, moments = backward_with_moments(block, *work, layer=LAYER)
        expected = trace_modules(block, *work, torch.float32)
    monkeypatch.setattr("lmq.model.streaming._EXPERTS_BYTES", 0)
    held: list[int] = []
    with seen.model.block(LAYER, only_run=True) as block:
        experts = block.mlp.experts

        def count(*_: object) -> None:
            numbers = {name.partition(".")[0] for name, tensor in experts.named_parameters() if not tensor.is_meta}
            held.append(sum(number.isdigit() for number in numbers))

        assert all(experts.get_submodule(str(number)).down_proj.weight.is_meta for number in range(4))
        for number in range(4):
            experts.get_submodule(str(number)).down_proj.register_forward_hook(count)
        assert torch.equal(forward_block(block, seen.inputs, seen.hidden, layer=LAYER), leaving)
        found_entering, found_moments = backward_with_moments(block, *work, layer=LAYER)
        traces = trace_modules(block, *work, torch.float32)
        only = backward_block(block, seen.inputs, seen.hidden, seen.gradient, layer=LAYER)
    assert set(held) == {1}
    torch.testing.assert_close(found_entering, entering, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(only, entering, rtol=1e-4, atol=1e-5)
    for kind in seen.kinds:
        assert_same_trace(traces[kind], expected[kind])
        for part, other in zip(found_moments[kind].blocks, moments[kind].blocks, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_a_time", ["all experts", "one expert"])
def test_every_token_goes_to_every_expert_when_asked(
    seen: Seen, at_a_time: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over all tokens in float64; one that is not routed to an expert has the mean weight of those it is."""
    tokens = SEQUENCES * LENGTH
    work = (seen.inputs, seen.hidden, seen.gradient, seen.kinds)
    with seen.model.block(LAYER) as block:
        plain, (entering, _) = (
            input_moments(block, *work[:2], seen.kinds),
            backward_with_moments(block, *work, layer=LAYER),
        )
        router: list[tuple[Tensor, Tensor]] = []
        at_sum: list[Tensor] = []

        def keep(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            router.append((args[1], args[2].detach()))
            output.register_hook(at_sum.append)

        handle = block.mlp.experts.register_forward_hook(keep)
        backward_block(block, seen.inputs, seen.hidden, seen.gradient, layer=LAYER)
        handle.remove()
        inside: dict[str, Tensor] = {}
        for number in range(4):
            kind = f"mlp.experts.{number}.down_proj"
            handle = block.get_submodule(kind).register_forward_pre_hook(
                lambda _, args, kind=kind: inside.__setitem__(kind, args[0])
            )
            block.mlp.experts.run(number, seen.entering_experts)
            handle.remove()
    if at_a_time == "one expert":
        monkeypatch.setattr("lmq.model.streaming._EXPERTS_BYTES", 0)
    with seen.model.block(LAYER, only_run=True) as block, every_token(block):
        found_entering, weighted = backward_with_moments(block, *work, layer=LAYER)
    with seen.model.block(LAYER) as block, every_token(block):
        found_plain = input_moments(block, *work[:2], seen.kinds)
    assert not any(module.every_token for module in block.modules() if isinstance(module, RoutedExperts))
    torch.testing.assert_close(found_entering, entering, rtol=1e-4, atol=1e-5)
    index, weights = (torch.cat(parts) for parts in zip(*router, strict=True))
    gradients = torch.stack([torch.cat(at_sum[draw::2]) for draw in range(2)]).double()  # draws of a sequence together
    for number in range(4):
        kind = f"mlp.experts.{number}.down_proj"
        states = inside[kind].double()
        of_plain = found_plain[kind].matrix().double()
        torch.testing.assert_close(of_plain, states.T @ states / tokens, rtol=1e-4, atol=1e-6)
        routed = (index == number).double()
        of_expert = torch.where(routed.any(1), (routed * weights).sum(1), weights.double().mean(1))
        of_token = (gradients * of_expert[:, None]).square().mean((0, 2))
        expected = (states * of_token[:, None]).T @ states / tokens
        torch.testing.assert_close(weighted[kind].matrix().double(), expected, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(found_plain[kind].matrix(), plain[kind].matrix()) for kind in experts_of(seen))
    others = [kind for kind in seen.kinds if ".experts." not in kind]
    assert all(torch.equal(found_plain[kind].matrix(), plain[kind].matrix()) for kind in others)


@pytest.mark.parametrize("fewest", [0, 1])
def test_second_moments_are_sums_over_the_routed_tokens(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    monkeypatch.setattr("lmq.measurement.pooling.FEWEST_TOKENS", fewest)
    traces = seen.traces()
    with seen.model.block(LAYER) as block:
        _, weighted = backward_with_moments(block, seen.inputs, seen.hidden, seen.gradient, seen.kinds, layer=LAYER)
        plain = input_moments(block, seen.inputs, seen.hidden, seen.kinds)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for kind in experts_of(seen):
        inputs, gradients = traces[kind].inputs.double(), traces[kind].gradients.double()
        by_weight, by_count = (torch.zeros(2, inputs.shape[1], inputs.shape[1], dtype=torch.float64)).unbind()
        for token, row in enumerate(inputs):
            of_draws = [gradients[token + draw * len(inputs)].square().mean() for draw in range(2)]
            by_weight += sum(of_draws) / 2 * torch.outer(row, row)
            by_count += torch.outer(row, row)
        sums[kind] = (by_weight / (SEQUENCES * LENGTH), by_count, len(inputs))
    for kind, (by_weight, by_count, count) in sums.items():
        if count < fewest:  # the last expert of gpt-oss takes what all share
            same = [other for other in sums if other.rsplit(".", 1)[1] == kind.rsplit(".", 1)[1]]
            by_weight = torch.stack([sums[other][0] for other in same]).mean(0)
            by_count = torch.stack([sums[other][1] for other in same]).sum(0)
            count = sum(sums[other][2] for other in same)
        torch.testing.assert_close(weighted[kind].matrix().double(), by_weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plain[kind].matrix().double(), by_count / max(1, count), rtol=1e-3, atol=1e-3)
    assert any(count == 0 for *_, count in sums.values()) == seen.model.structure.architecture.startswith("GptOss")


def test_an_expert_of_few_tokens_is_measured_on_a_share_of_all(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = seen.traces()
    monkeypatch.setattr("lmq.measurement.pooling.FEWEST_TOKENS", 0)
    assert pooled_traces(traces) == traces
    monkeypatch.setattr("lmq.measurement.pooling.FEWEST_TOKENS", 10**9)
    pooled = pooled_traces(traces)
    same = [kind for kind in experts_of(seen) if kind.endswith("down_proj")]
    for name in ("inputs", "gradients"):
        before = torch.cat([getattr(traces[kind], name) for kind in same])
        after = torch.cat([getattr(pooled[kind], name) for kind in same])
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    for kind in same:
        assert abs(len(pooled[kind].inputs) - sum(len(traces[each].inputs) for each in same) / len(same)) <= SEQUENCES
        assert sum(pooled[kind].lengths or ()) == len(pooled[kind].inputs)
    others = [kind for kind in seen.kinds if ".experts." not in kind]
    assert all(pooled[kind] is traces[kind] for kind in others)


def test_pooled_moments_are_the_mean_of_a_matrix_of_all_experts() -> None:
    moments = {"mlp.experts.0.down_proj": 1.0, "mlp.experts.1.down_proj": 3.0, "self_attn.q_proj": 9.0}
    tokens = {"mlp.experts.0.down_proj": 1000, "mlp.experts.1.down_proj": 63, "self_attn.q_proj": 1}
    pooled = pooled_moments(moments, tokens, lambda values: sum(values) / len(values))
    assert pooled == {**moments, "mlp.experts.1.down_proj": 2.0}


def test_sensitivity_of_an_expert_is_that_of_its_own_output(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmq.measurement.activation.FEWEST_TOKENS", 0)
    modules = seen.model.structure.in_layer(LAYER)
    generator = torch.Generator().manual_seed(9)
    with seen.model.block(LAYER) as block:
        weights = {kind: block.get_submodule(kind).get_parameter("weight").clone() for kind in seen.kinds}
        changed = {
            kind: weight + 0.05 * torch.randn(weight.shape, generator=generator) for kind, weight in weights.items()
        }
        scores = part_sensitivities(block, seen.inputs, seen.hidden, modules, changed)
        experts = block.mlp.experts
        for number in range(experts.num_experts):
            tokens = seen.entering_experts[(seen.routed == number).any(1)]
            biases = [experts._parameters.get(f"{name}_bias") for name in ("gate_up_proj", "down_proj")]
            own = [None if bias is None else bias[number] for bias in biases]
            expert = experts.get_submodule(str(number))
            first = f"mlp.experts.{number}.gate_up_proj"
            with torch.no_grad():
                before = expert(tokens, *own)
                expert.gate_up_proj.weight.copy_(changed[first])
                after = expert(tokens, *own)
                expert.gate_up_proj.weight.copy_(weights[first])
            expected = float((after - before).square().mean()) if len(tokens) else 0.0
            assert scores[f"mlp_gate mlp.experts.{number}"] == pytest.approx(expected, rel=1e-3)
    assert {judged_with(info) for info in modules} == set(scores)


def test_tokens_of_every_expert_are_counted_and_few_are_named(seen: Seen) -> None:
    layer = LayerReplay(
        seen.model.structure,
        LAYER,
        device=torch.device("cpu"),
        settings={},
        open_model=lambda: seen.model,
        read_weights=dict,
        inputs={Need.STATES: lambda: seen.hidden},
    )
    with layer:
        rows = list(measure_expert_tokens(layer))
    counts = seen.routed.flatten().bincount(minlength=4).tolist()
    assert [(row["kind"], row["tokens"]) for row in rows] == [(f"mlp.experts.{n}", c) for n, c in enumerate(counts)]
    few = [number for number, count in enumerate(counts) if count < 64]
    assert [row["pooled"] for row in rows] == [number in few for number in range(4)]
    (sentence,) = pooled_experts(rows)
    assert all(f"layer {LAYER} mlp.experts.{number} ({counts[number]})" in sentence for number in few)
    assert pooled_experts([{**row, "pooled": False} for row in rows]) == []


def test_gradients_at_the_quantized_point_pass_experts_that_no_token_reaches(seen: Seen) -> None:
    class Itself:
        def to(self, _):
            return self

        def round_trip(self, weight: Tensor) -> Tensor:
            return weight

    structure = seen.model.structure
    grids = {layer: {info.id: {SPEC: Itself()} for info in structure.in_layer(layer)} for layer in (0, 1)}
    point = QuantizedPoint(seen.model, grids.__getitem__, matmul_dtype=torch.float32)
    tokens = torch.arange(10, 10 + LENGTH)[None]
    allocation = {info.id: SPEC for info in structure.modules}
    found = point.weight_gradients(tokens, allocation, torch.ones_like)
    layers = {layer.number: layer.gradients for layer in found}
    routed = {
        kind: layers[LAYER][info.id] for info in structure.in_layer(LAYER) if ".experts." in (kind := info.id.kind)
    }
    assert len(layers) == 2
    if structure.architecture.startswith("GptOss"):
        assert not routed["mlp.experts.3.down_proj"].any()
    assert any(gradient.any() for gradient in routed.values())
