from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.sequence_fisher import (
    pooled_costs,
    sampled_loss_gradient,
    sequence_fisher,
    sequence_loss_changes,
)
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel

SEQUENCES, LENGTH = 2, 12
SMALL, LARGE = QuantSpec(3, 64), QuantSpec(4, 64)


def tokens() -> Tensor:
    return torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def open_both(path: Path) -> tuple[PreTrainedModel, StreamedModel]:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return plain, StreamedModel.open(path, discover(path, weights_sha256="0"))


def last_block_states(plain: PreTrainedModel, streamed: StreamedModel) -> Tensor:
    """States that leave the last block of the whole model, before the final norm."""
    kept: list[Tensor] = []
    last = plain.get_submodule(f"{streamed.structure.layers_path}.{streamed.structure.layers - 1}")
    handle = last.register_forward_hook(
        lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        plain(tokens())
    handle.remove()
    return kept[0]


def trace_by_hand(sequences: int, length: int, seed: int = 0) -> ModuleTrace:
    generator = torch.Generator().manual_seed(seed)
    count = sequences * length
    return ModuleTrace(torch.randn(count, 8, generator=generator), torch.randn(count, 6, generator=generator))


def changes_by_hand(trace: ModuleTrace, error: Tensor, length: int) -> list[float]:
    """Σ_tokens g · E x of every sequence, in float64, token by token."""
    changes = []
    for start in range(0, len(trace.inputs), length):
        change = 0.0
        for token in range(start, start + length):
            output = error.double() @ trace.inputs[token].double()
            change += (trace.gradients[token].double() @ output).item()
        changes.append(change)
    return changes


@pytest.mark.parametrize("elements_at_once", [8, 1 << 23], ids=["row by row", "all rows"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_changes_are_those_of_a_float64_loop_over_tokens(
    dtype: torch.dtype, tolerance: float, elements_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmq.measurement.sequence_fisher._ELEMENTS_AT_ONCE", elements_at_once)
    exact = trace_by_hand(3, 7)
    trace = ModuleTrace(exact.inputs.to(dtype), exact.gradients.to(dtype))
    errors = {spec: torch.randn(6, 8, generator=torch.Generator().manual_seed(spec.bits)) for spec in (SMALL, LARGE)}
    found = sequence_loss_changes(trace, errors, sequence_length=7)
    assert list(found) == [SMALL, LARGE]
    for spec, error in errors.items():
        expected = changes_by_hand(exact, error, 7)
        scale = max(abs(change) for change in expected)
        assert found[spec].tolist() == pytest.approx(expected, abs=tolerance * scale)


def test_cost_is_half_the_mean_square_per_token() -> None:
    assert sequence_fisher(torch.tensor([3.0, -1.0]), tokens_per_sequence=5) == pytest.approx(0.5)
    around = torch.tensor([1.0, -1.0])
    assert sequence_fisher(torch.tensor([3.0, -1.0]), tokens_per_sequence=5, around=around) == pytest.approx(0.2)
    assert sequence_fisher(around, tokens_per_sequence=5, around=around) == 0.0


def test_a_trace_of_broken_sequences_is_refused() -> None:
    with pytest.raises(InputError, match="a trace of 21 tokens is not made of sequences of 8"):
        sequence_loss_changes(trace_by_hand(3, 7), {SMALL: torch.zeros(6, 8)}, sequence_length=8)


def test_drawn_gradients_average_to_zero_and_depend_on_the_seed_alone(tiny_model: Path) -> None:
    plain, streamed = open_both(tiny_model)
    hidden = last_block_states(plain, streamed)
    first = sampled_loss_gradient(streamed, hidden, draws=1, seed=1)
    assert first.shape == hidden.shape
    assert first.dtype == torch.float32
    assert torch.equal(first, sampled_loss_gradient(streamed, hidden, draws=1, seed=1))
    assert not torch.equal(first, sampled_loss_gradient(streamed, hidden, draws=1, seed=2))
    assert not first[:, -1].any()
    draws = sampled_loss_gradient(streamed, hidden, draws=200, seed=3).view(200, *hidden.shape)
    assert draws.mean(dim=0).norm() < 3 * draws.flatten(1).norm(dim=1).mean() / 200**0.5


def test_pooled_costs_keep_the_level_of_sequences_and_the_steps_of_tokens() -> None:
    menu = [QuantSpec(bits, 64) for bits in (2, 3, 4, 8)]
    by_sequence = dict(zip(menu, (8.0, 1.0, 0.5, 0.0), strict=True))
    by_token = dict(zip(menu, (4.0, 1.0, 0.25, 0.0), strict=True))
    pooled = pooled_costs(by_sequence, by_token)
    level = (2.0 * 1.0 * 2.0) ** (1 / 3)  # the exact one tells nothing about the level
    assert list(pooled.values()) == pytest.approx([4 * level, level, level / 4, 0])
    assert pooled_costs({SMALL: 3.0}, {SMALL: 2.0}) == pytest.approx({SMALL: 3.0})
    assert pooled_costs({SMALL: 0.0}, {SMALL: 0.0}) == {SMALL: 0.0}


@pytest.mark.parametrize("among_images", [False, True])
def test_mean_cost_over_draws_is_the_divergence_of_a_small_error(tiny_model: Path, among_images: bool) -> None:
    """Where images stand among the tokens, it is the divergence per token of text."""
    is_text = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    if among_images:
        is_text[0, :7] = False
        is_text[1, 3:5] = False
    plain, streamed = open_both(tiny_model)
    last = streamed.structure.layers - 1
    kind = streamed.structure.in_layer(last)[0].id.kind
    linear = plain.get_submodule(f"{streamed.structure.layers_path}.{last}.{kind}")
    error = 1e-2 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(5))
    hidden = last_block_states(plain, streamed)
    entering: list[Tensor] = []
    block_of_plain = plain.get_submodule(f"{streamed.structure.layers_path}.{last}")
    block_of_plain.register_forward_pre_hook(lambda _, args: entering.append(args[0].detach()))
    reference = log_probabilities(plain)
    linear.weight.data += error
    changed = log_probabilities(plain)
    divergences = (reference.exp() * (reference - changed)).sum(-1)[:, :-1]
    inputs = streamed.block_inputs(LENGTH)[last]
    gradient = sampled_loss_gradient(streamed, hidden, draws=150, seed=0, is_text=is_text if among_images else None)
    assert gradient.view(150, *hidden.shape)[:, :, :-1].any(-1).any(0).equal(is_text[:, 1:])
    with streamed.block(last) as block:
        trace = trace_modules(block, inputs, entering[0], gradient, [kind], torch.float32)[kind]
    changes = sequence_loss_changes(trace, {SMALL: error}, sequence_length=LENGTH)[SMALL]
    assert len(changes) == 150 * SEQUENCES
    cost = sequence_fisher(changes, tokens_per_sequence=LENGTH - 1)
    assert cost == pytest.approx(divergences[is_text[:, 1:]].mean().item(), rel=0.2)


@torch.no_grad()
def log_probabilities(model: nn.Module) -> Tensor:
    return model(tokens()).logits.double().log_softmax(-1)
