from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmq.errors import InputError
from lmq.formats.nf4 import NormalFloat4
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.activation import part_sensitivities
from lmq.measurement.grids import fit_grids
from lmq.measurement.second_moments import (
    MODULE_ERRORS_SCHEMA,
    ModuleStatistics,
    SecondMoments,
    capture_second_moments,
    delta_loss,
    fisher_estimate,
    gradient_token_weights,
    mean_squared_gradient,
    module_errors,
    row_errors,
    second_moments,
    traced_statistics,
)
from lmq.measurement.token_fisher import token_fisher
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.quantizers import quantizer
from lmq.tables import read_rows, write_rows

SEQUENCES, LENGTH, LAYER = 3, 24, 1
TOKENS = SEQUENCES * LENGTH


def open_streamed(path: Path) -> StreamedModel:
    return StreamedModel.open(path, discover(path, weights_sha256="0"))


@torch.no_grad()
def look_at(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """States that enter the layer of a plain model, and the inputs [tokens, in_features] of each of its modules."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    block = model.get_submodule(f"model.layers.{LAYER}")
    entering: list[Tensor] = []
    inputs: dict[str, Tensor] = {}
    block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    for kind, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, kind=kind: inputs.update({kind: args[0].flatten(0, 1)}))
    model(torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1)))
    return entering[0], inputs


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_by_loop(inputs: Tensor, weights: Tensor | None = None) -> np.ndarray:
    rows = inputs.double().numpy()
    shares = np.full(len(rows), 1 / len(rows)) if weights is None else (weights / weights.sum()).double().numpy()
    return np.asarray(sum(share * np.outer(row, row) for share, row in zip(shares, rows, strict=True)))


def output_errors(inputs: Tensor, error: Tensor) -> Tensor:
    """Mean square of each output's error over the tokens, replayed in float64."""
    return (inputs.double() @ error.double().t()).square().mean(0)


def test_captured_moments_and_errors_are_those_of_the_plain_model_replayed(tiny_model: Path) -> None:
    entering, inputs = look_at(tiny_model)
    streamed = open_streamed(tiny_model)
    fitter = quantizer("rtn")
    with streamed.block(LAYER) as block:
        captured = capture_second_moments(block, streamed.block_inputs(LENGTH)[LAYER], entering, list(inputs))
        weights = {kind: block.get_submodule(kind).weight.detach().clone() for kind in inputs}
        assert not any(module._forward_pre_hooks for module in block.modules())
    for kind, moments in captured.items():
        assert moments.tokens == TOKENS
        expected = moments_by_loop(inputs[kind])
        np.testing.assert_allclose(moments.matrix.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())
        errors = [
            grid.round_trip(weights[kind]) - weights[kind] for grid in fit_grids(weights[kind], STOPS, fitter).values()
        ]
        errors.append(NormalFloat4().round_trip(weights[kind]) - weights[kind])
        replayed = [output_errors(inputs[kind], error).mean().item() for error in errors]
        assert module_errors(moments, errors) == pytest.approx(replayed, rel=1e-4), kind


def test_modules_that_share_an_input_share_its_moments(tiny_qwen: Path) -> None:
    streamed = open_streamed(tiny_qwen)
    kinds = [module.id.kind for module in streamed.structure.in_layer(LAYER)]
    with streamed.block(LAYER) as block:
        captured = capture_second_moments(
            block, streamed.block_inputs(LENGTH)[LAYER], random_tensor(2, LENGTH, 64), kinds
        )
    found = {kind.partition(".")[2]: moments for kind, moments in captured.items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(moments) for moments in captured.values()}) == 4


@pytest.mark.parametrize(("part", "kind"), [("attn_out", "self_attn.o_proj"), ("mlp_down", "mlp.down_proj")])
def test_the_error_of_a_module_is_the_sensitivity_of_a_part_that_is_it_alone(
    tiny_model: Path, part: str, kind: str
) -> None:
    entering, _ = look_at(tiny_model)
    streamed = open_streamed(tiny_model)
    modules = [module for module in streamed.structure.in_layer(LAYER) if module.part == part]
    assert [module.id.kind for module in modules] == [kind]
    with streamed.block(LAYER) as block:
        inputs = streamed.block_inputs(LENGTH)[LAYER]
        weight = block.get_submodule(kind).weight.detach()
        moments = capture_second_moments(block, inputs, entering, [kind])[kind]
        for spec in (QuantSpec(2, 64), QuantSpec(4, 32)):
            quantized = fit_grids(weight, [spec], quantizer("hqq"))[spec].round_trip(weight)
            score = part_sensitivities(block, inputs, entering, modules, {kind: quantized})[part]
            assert module_errors(moments, [quantized - weight]) == pytest.approx([score], rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_long_inputs_are_summed_piece_by_piece(tokens: int, dtype: torch.dtype) -> None:
    inputs = random_tensor(tokens, 6).to(dtype)
    weights = random_tensor(tokens, seed=1).square() * 1e-30
    for token_weights in (None, weights):
        moments = second_moments(inputs, token_weights)
        np.testing.assert_allclose(moments.matrix.numpy(), moments_by_loop(inputs, token_weights), rtol=1e-4, atol=1e-5)
        assert (moments.tokens, moments.in_features, moments.matrix.dtype) == (tokens, 6, torch.float32)


def test_moments_of_many_inputs_are_symmetric_and_whole() -> None:
    inputs = random_tensor(300, 600) + 1
    found = second_moments(inputs).matrix
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), inputs.double().t() @ inputs.double() / 300, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 511), (1030, 8), (5, 513), (40, 1300)])
def test_row_errors_of_any_shape_are_those_of_the_whole_product(shape: tuple[int, int]) -> None:
    inputs = random_tensor(200, shape[1]) + 3  # a mean direction, as of the attention sink
    error = random_tensor(*shape, seed=1) * 0.01
    kept = error.clone()
    found = row_errors(second_moments(inputs), error)
    torch.testing.assert_close(found, output_errors(inputs, error), rtol=1e-4, atol=0)
    assert found.dtype == torch.float64
    assert torch.equal(error, kept)


def test_no_error_costs_nothing_and_rounding_makes_no_negative_cost() -> None:
    moments = second_moments(torch.full((1, 64), 1e4))
    assert module_errors(moments, [torch.zeros(8, 64)]) == [0.0]
    balanced = random_tensor(512, 64)
    balanced -= balanced.mean(1, keepdim=True)
    assert (row_errors(moments, balanced) >= 0).all()


def test_few_tokens_leave_the_moments_rank_deficient() -> None:
    assert second_moments(random_tensor(63, 64)).rank_deficient
    assert not second_moments(random_tensor(64, 64)).rank_deficient


def test_weights_that_do_not_fit_the_tokens_are_refused() -> None:
    for weights in (torch.ones(3), -torch.ones(4), torch.zeros(4), torch.full((4,), torch.nan)):
        with pytest.raises(InputError, match=r"token weights \[\d\] with sum .* do not fit 4 tokens"):
            second_moments(random_tensor(4, 2), weights)


def fisher_estimates(trace: ModuleTrace, error: Tensor) -> tuple[float, float]:
    """From H and from H weighted by the gradient."""
    plain = second_moments(trace.inputs)
    weighted = second_moments(trace.inputs, gradient_token_weights(trace.gradients))
    squared_gradient = mean_squared_gradient(trace.gradients)
    return tuple(fisher_estimate(m, row_errors(m, error), squared_gradient) for m in (plain, weighted))  # type: ignore[return-value]


def test_fisher_estimates_equal_loops_over_a_block_replayed_backward(tiny_qwen: Path) -> None:
    entering, inputs = look_at(tiny_qwen)
    streamed = open_streamed(tiny_qwen)
    gradient = random_tensor(*entering.shape, seed=3)
    with streamed.block(LAYER) as block:
        traces = trace_modules(
            block, streamed.block_inputs(LENGTH)[LAYER], entering, gradient, list(inputs), torch.float32
        )
    for kind, trace in traces.items():
        error = 0.02 * random_tensor(trace.gradients.shape[1], trace.inputs.shape[1], seed=4)
        gradients, changes = trace.gradients.double(), inputs[kind].double() @ error.double().t()
        sizes = gradients.square().sum(1)
        diagonal = (gradients.square().mean(0) * changes.square().mean(0)).sum() * TOKENS
        by_gradient = (sizes[:, None] * changes.square()).sum(0) / sizes.sum()
        weighted = (gradients.square().mean(0) * by_gradient).sum() * TOKENS
        assert fisher_estimates(trace, error) == pytest.approx((diagonal.item(), weighted.item()), rel=1e-4), kind


def test_independent_gradients_make_both_estimates_the_token_wise_sum() -> None:
    trace = ModuleTrace(random_tensor(20_000, 8), random_tensor(20_000, 6, seed=1))
    error = random_tensor(6, 8, seed=2)
    assert fisher_estimates(trace, error) == pytest.approx([token_fisher(trace, error)] * 2, rel=0.05)


def test_a_sink_without_gradient_misleads_the_plain_estimate_only() -> None:
    inputs, gradients = random_tensor(20_000, 8), random_tensor(20_000, 6, seed=1)
    inputs[::100] *= 1000
    gradients[::100] = 0
    trace = ModuleTrace(inputs, gradients)
    error = random_tensor(6, 8, seed=2)
    plain, weighted = fisher_estimates(trace, error)
    assert weighted == pytest.approx(token_fisher(trace, error), rel=0.05)
    assert plain > 1000 * weighted


def test_gradients_far_below_one_are_not_lost() -> None:
    trace = ModuleTrace(random_tensor(30, 8), random_tensor(30, 6, seed=1) * 1e-25)
    error = random_tensor(6, 8, seed=2)
    scaled = ModuleTrace(trace.inputs, trace.gradients.double() * 1e25)
    kept = scaled.gradients.clone()
    expected = fisher_estimates(scaled, error)
    assert torch.equal(scaled.gradients, kept)
    assert [value * 1e50 for value in fisher_estimates(trace, error)] == pytest.approx(expected, rel=1e-5)


def test_delta_loss_is_the_first_order_change_of_a_loss() -> None:
    weight, inputs = random_tensor(1500, 8).requires_grad_(True), random_tensor(20, 8, seed=1)
    error = 1e-6 * random_tensor(1500, 8, seed=2)

    def loss(of_weight: Tensor) -> Tensor:
        return (inputs.double() @ of_weight.double().t()).tanh().sum()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    change = (loss(weight.double() + error.double()) - loss(weight)).item()
    assert delta_loss(gradient, error) == pytest.approx(abs(change), rel=1e-3)
    assert delta_loss(gradient, -error) == delta_loss(gradient, error)
    with pytest.raises(InputError, match=r"gradient \[8, 1500\] does not fit an error \[1500, 8\]"):
        delta_loss(gradient.t(), error)


def test_an_error_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"error \[4, 7\] does not fit second moments of 8 inputs"):
        row_errors(SecondMoments(torch.eye(8), 10), torch.ones(4, 7))


def test_schema_holds_costs_that_were_measured_and_nulls_for_others(tmp_path: Path) -> None:
    row = {
        "layer": 1,
        "kind": "mlp.up_proj",
        "bits": 4,
        "group_size": 64,
        "meta_bits": 8,
        "meta_group_size": 128,
        "parameters": 8192,
        "size_bytes": 4400,
        "tokens": 72,
        "in_features": 64,
        "input_error": 0.5,
        "fisher_diagonal": 0.25,
        "fisher_weighted": None,
        "delta_loss": None,
    }
    write_rows(tmp_path / "m.parquet", MODULE_ERRORS_SCHEMA, [row])
    assert read_rows(tmp_path / "m.parquet", MODULE_ERRORS_SCHEMA) == [row]


TRACED = 40
INPUTS = random_tensor(TRACED, 12, seed=0)
TRACES = {
    "q": ModuleTrace(INPUTS, random_tensor(TRACED, 6, seed=1)),
    "k": ModuleTrace(INPUTS, random_tensor(TRACED, 3, seed=2)),
    "down": ModuleTrace(random_tensor(TRACED, 5, seed=3), random_tensor(TRACED, 4, seed=4)),
}


@pytest.mark.parametrize("kind", TRACES)
def test_costs_are_those_of_loops_over_the_tokens(kind: str) -> None:
    trace = TRACES[kind]
    error = random_tensor(trace.gradients.shape[1], trace.inputs.shape[1], seed=5)
    found = dict(traced_statistics(TRACES))[kind].costs(error)
    inputs, gradients, changed = trace.inputs.double(), trace.gradients.double(), error.double()
    sizes = gradients.square().sum(1)
    squares = [(changed @ x) ** 2 for x in inputs]
    mean_squared_gradient = gradients.square().mean(0)
    diagonal = sum(float(mean_squared_gradient @ square) for square in squares)
    weighted = sum(float(mean_squared_gradient @ square) * float(w) for square, w in zip(squares, sizes, strict=True))
    slope = sum(float(g @ changed @ x) for g, x in zip(gradients, inputs, strict=True))
    assert found["input_error"] == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)
    assert found["fisher_diagonal"] == pytest.approx(diagonal, rel=1e-5)
    assert found["fisher_weighted"] == pytest.approx(weighted * TRACED / float(sizes.sum()), rel=1e-5)
    assert found["delta_loss"] == pytest.approx(abs(slope), rel=1e-4)


def test_modules_of_one_input_share_its_moments() -> None:
    statistics = dict(traced_statistics(TRACES))
    assert statistics["q"].moments is statistics["k"].moments
    assert statistics["q"].moments is not statistics["down"].moments


def test_without_gradients_what_needs_them_is_not_measured() -> None:
    found = ModuleStatistics(second_moments(INPUTS)).costs(random_tensor(6, 12, seed=5))
    assert found["input_error"] is not None
    assert found["fisher_diagonal"] is found["fisher_weighted"] is found["delta_loss"] is None


def test_where_no_gradient_comes_back_costs_by_gradients_are_0() -> None:
    """As behind an output matrix of zeros; the output error is measured all the same."""
    error = random_tensor(6, 12, seed=5)
    found = dict(traced_statistics({"q": ModuleTrace(INPUTS, torch.zeros(TRACED, 6))}))["q"].costs(error)
    alone = ModuleStatistics(second_moments(INPUTS)).costs(error)
    assert found == {"input_error": alone["input_error"], "fisher_diagonal": 0, "fisher_weighted": 0, "delta_loss": 0}
