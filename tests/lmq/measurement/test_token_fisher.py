from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmq.measurement.token_fisher import token_fisher
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.numerics import fast_matmul_dtype

SEQUENCES, LENGTH, LAYER = 3, 24, 1


@dataclass
class Seen:
    """What a plain model's hooks see at one block: states in, gradient out, and both of every module."""

    entering: Tensor = field(default_factory=lambda: torch.empty(0))
    leaving: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gradient(self) -> Tensor:
        assert self.leaving.grad is not None
        return self.leaving.grad

    def trace(self, kind: str) -> ModuleTrace:
        gradient = self.outputs[kind].grad
        assert gradient is not None
        return ModuleTrace(self.inputs[kind].detach().flatten(0, 1), gradient.flatten(0, 1))


def look_at(path: Path) -> Seen:
    """Forward and backward of the whole model, all sequences at once, without streaming."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    token_ids = torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    seen = Seen()

    def keep_block(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.entering, seen.leaving = args[0].detach(), output

    def keep_module(kind: str) -> None:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen.inputs[kind], seen.outputs[kind] = args[0], output

        block.get_submodule(kind).register_forward_hook(keep)

    block = model.get_submodule(f"model.layers.{LAYER}")
    block.register_forward_hook(keep_block)
    for kind, module in block.named_modules():
        if isinstance(module, nn.Linear):
            keep_module(kind)
    logits = model(token_ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum").backward()
    return seen


def replay(path: Path, seen: Seen, dtype: torch.dtype) -> dict[str, ModuleTrace]:
    streamed = StreamedModel.open(path, discover(path, weights_sha256="0"))
    kinds = [module.id.kind for module in streamed.structure.in_layer(LAYER)]
    with streamed.block(LAYER) as block:
        return trace_modules(block, streamed.block_inputs(LENGTH)[LAYER], seen.entering, seen.gradient, kinds, dtype)


def error_like(trace: ModuleTrace) -> Tensor:
    shape = (trace.gradients.shape[1], trace.inputs.shape[1])
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fisher_by_token(trace: ModuleTrace, error: Tensor) -> float:
    total = 0.0
    for inputs, gradient in zip(trace.inputs.double(), trace.gradients.double(), strict=True):
        total += (gradient @ (error.double() @ inputs)).item() ** 2
    return total


def test_traces_are_what_hooks_on_the_plain_model_see(tiny_model: Path) -> None:
    seen = look_at(tiny_model)
    traces = replay(tiny_model, seen, torch.float32)
    assert traces.keys() == seen.inputs.keys()
    for kind, trace in traces.items():
        expected = seen.trace(kind)
        scale = expected.gradients.abs().max().item()
        torch.testing.assert_close(trace.inputs, expected.inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace.gradients, expected.gradients, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_cost_equals_a_float64_loop_over_the_tokens_of_the_plain_model(
    tiny_model: Path, dtype: torch.dtype, tolerance: float
) -> None:
    seen = look_at(tiny_model)
    for kind, trace in replay(tiny_model, seen, dtype).items():
        assert trace.inputs.dtype == trace.gradients.dtype == dtype
        expected = seen.trace(kind)
        error = error_like(expected)
        assert token_fisher(trace, error) == pytest.approx(fisher_by_token(expected, error), rel=tolerance), kind


def test_modules_that_share_an_input_share_its_memory(tiny_qwen: Path) -> None:
    traces = replay(tiny_qwen, look_at(tiny_qwen), torch.bfloat16)
    memory = {kind.partition(".")[2]: trace.inputs.data_ptr() for kind, trace in traces.items()}
    assert memory["q_proj"] == memory["k_proj"] == memory["v_proj"]
    assert memory["gate_proj"] == memory["up_proj"]
    assert len(set(memory.values())) == 4


def test_block_and_arguments_are_left_as_they_were(tiny_gemma: Path) -> None:
    seen = look_at(tiny_gemma)
    entering, gradient = seen.entering.clone(), seen.gradient.clone()
    streamed = StreamedModel.open(tiny_gemma, discover(tiny_gemma, weights_sha256="0"))
    inputs = streamed.block_inputs(LENGTH)[LAYER]
    with streamed.block(LAYER) as block:
        block.requires_grad_(True)
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        trace_modules(block, inputs, entering, gradient, ["mlp.down_proj"], torch.float32)
        assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
        assert all(parameter.grad is None for parameter in block.parameters())
        assert not any(module._forward_hooks for module in block.modules())
    assert torch.equal(entering, seen.entering)
    assert torch.equal(gradient, seen.gradient)
    assert not entering.requires_grad


def test_hooks_are_removed_when_the_replay_fails(tiny_llama: Path) -> None:
    streamed = StreamedModel.open(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    states = torch.zeros(1, LENGTH, 32)
    with streamed.block(LAYER) as block:
        with pytest.raises(RuntimeError):
            trace_modules(block, streamed.block_inputs(LENGTH)[LAYER], states, states, ["mlp.down_proj"], torch.float32)
        assert not any(module._forward_hooks for module in block.modules())


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 5000])
def test_long_traces_are_summed_piece_by_piece(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    trace = ModuleTrace(torch.randn(tokens, 8, generator=generator), torch.randn(tokens, 6, generator=generator))
    kept = trace.inputs.clone(), trace.gradients.clone()
    error = torch.randn(6, 8, generator=generator)
    assert token_fisher(trace, error) == pytest.approx(fisher_by_token(trace, error), rel=1e-5)
    assert torch.equal(trace.inputs, kept[0])
    assert torch.equal(trace.gradients, kept[1])


def test_no_error_costs_nothing() -> None:
    trace = ModuleTrace(torch.randn(5, 8), torch.randn(5, 6))
    assert token_fisher(trace, torch.zeros(6, 8)) == 0.0


def test_gradients_far_below_one_are_not_lost() -> None:
    trace = ModuleTrace(torch.full((3, 8), 1e-12), torch.full((3, 6), 1e-12))
    assert token_fisher(trace, torch.ones(6, 8)) == pytest.approx(3 * (6 * 8 * 1e-24) ** 2, rel=1e-5)


def test_the_fast_type_is_one_that_torch_multiplies() -> None:
    dtype = fast_matmul_dtype(torch.device("cpu"))
    assert dtype in (torch.bfloat16, torch.float32)
