from pathlib import Path

import pytest
import torch
from lmq.discovery import discover
from lmq.streaming import StreamedModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

SEQUENCES, LENGTH = 3, 24


def open_streamed(path: Path) -> StreamedModel:
    return StreamedModel.open(path, discover(path, weights_sha256="0"))


def open_plain(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def run_blocks(streamed: StreamedModel, hidden: Tensor) -> list[Tensor]:
    """States that enter each block, and those that leave the last one."""
    states = [hidden]
    inputs = streamed.block_inputs(hidden.shape[1])
    for layer in range(streamed.structure.layers):
        with streamed.block(layer) as block:
            states.append(inputs[layer].run(block, states[-1]))
    return states


def test_logits_and_states_equal_a_plain_forward(tiny_model: Path, token_ids: Tensor) -> None:
    plain, streamed = open_plain(tiny_model), open_streamed(tiny_model)
    outputs: list[Tensor] = []
    for block in plain.model.layers:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        expected = plain(token_ids).logits
        states = run_blocks(streamed, streamed.embed(token_ids))
        logits = streamed.head_logits(states[-1])
    for state, output in zip(states[1:], outputs, strict=True):
        torch.testing.assert_close(state, output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_loss_gradients_equal_autograd_on_the_plain_model(tiny_model: Path, token_ids: Tensor) -> None:
    plain, streamed = open_plain(tiny_model), open_streamed(tiny_model)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for block in plain.model.layers:
        block.register_forward_hook(keep)
    logits = plain(token_ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    found = streamed.loss_gradient(outputs[-1].detach(), token_ids)
    assert found.tokens == SEQUENCES * (LENGTH - 1)
    assert found.loss_sum == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(found.gradient, outputs[-1].grad, atol=1e-5, rtol=1e-4)
