from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lmq.errors import DamagedFile, InputError, NotFiniteError
from lmq.measurement.replay import (
    StatesByLayer,
    backward_block,
    forward_block,
    read_gradients,
    read_hidden_states,
    write_gradients,
    write_hidden_states,
)
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel

SEQUENCES, LENGTH, HIDDEN = 3, 24, 64


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(2, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def states() -> Tensor:
    return torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_at_every_block_equal_autograd_on_the_plain_model(
    tiny_model: Path, token_ids: Tensor, batch: int
) -> None:
    streamed = StreamedModel.open(tiny_model, discover(tiny_model, weights_sha256="0"))
    inputs = streamed.block_inputs(LENGTH)
    entering = [streamed.embed(token_ids)]
    for layer in range(streamed.structure.layers):
        with streamed.block(layer) as block:
            entering.append(forward_block(block, inputs[layer], entering[-1], layer=layer, batch=batch))
    gradients = [streamed.loss_gradient(entering[-1], token_ids).gradient]
    for layer in reversed(range(streamed.structure.layers)):
        with streamed.block(layer) as block:
            gradients.append(
                backward_block(block, inputs[layer], entering[layer], gradients[-1], layer=layer, batch=batch)
            )

    expected = _plain_gradients(tiny_model, token_ids)
    for found, reference in zip(reversed(gradients), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5 * reference.abs().max().item(), rtol=1e-4)


def _plain_gradients(path: Path, token_ids: Tensor) -> list[Tensor]:
    """Gradients at what enters each block and at what leaves the last, from one backward pass of the whole model."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        tensor.retain_grad()
        kept.append(tensor)

    plain.model.layers[0].register_forward_pre_hook(lambda _, args: keep(args[0]))
    for block in plain.model.layers:
        block.register_forward_hook(lambda _, __, output: keep(output))
    logits = plain(token_ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum").backward()
    return [tensor.grad for tensor in kept if tensor.grad is not None]


def test_replaying_leaves_inputs_and_weights_as_they_were(tiny_qwen: Path, states: Tensor) -> None:
    streamed = StreamedModel.open(tiny_qwen, discover(tiny_qwen, weights_sha256="0"))
    before = states.clone()
    with streamed.block(0) as block:
        backward_block(block, streamed.block_inputs(LENGTH)[0], states, torch.ones_like(states), layer=0)
        assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(states, before)
    assert not states.requires_grad


def test_states_that_are_not_finite_name_the_layer(tiny_llama: Path, states: Tensor) -> None:
    streamed = StreamedModel.open(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    inputs = streamed.block_inputs(LENGTH)[2]
    broken = states.clone()
    broken[1, 3, 5] = torch.inf
    with streamed.block(2) as block:
        with pytest.raises(NotFiniteError, match="leave layer 2"):
            forward_block(block, inputs, broken, layer=2)
        with pytest.raises(NotFiniteError, match="enter layer 2"):
            backward_block(block, inputs, states, broken, layer=2)


def test_the_module_that_overflows_is_named(tiny_llama: Path, states: Tensor) -> None:
    streamed = StreamedModel.open(tiny_llama, discover(tiny_llama, weights_sha256="0"))
    with streamed.block(2) as block:
        block.get_submodule("mlp.up_proj").weight.mul_(1e6)
        block.get_submodule("mlp.down_proj").weight.mul_(1e37)
        with pytest.raises(NotFiniteError, match=r"leave layer 2 .* outputs of its mlp\.down_proj are the first"):
            forward_block(block, streamed.block_inputs(LENGTH)[2], states, layer=2)


@pytest.mark.parametrize(
    ("write", "read", "label"),
    [
        (write_hidden_states, read_hidden_states, b"hidden-states/1"),
        (write_gradients, read_gradients, b"gradients/1"),
    ],
)
def test_tables_give_back_the_same_bits(write, read, label: bytes, states: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "states.parquet"
    write(path, states)
    found = read(path)
    assert torch.equal(found, states)
    found += 1
    table = pq.read_table(path)
    assert table.schema.metadata[b"lmq.schema"] == label
    assert table.schema.field("values").type.list_size == HIDDEN
    last = table.to_pylist()[-1]
    assert (last["sequence"], last["position"]) == (SEQUENCES - 1, LENGTH - 1)
    assert last["values"] == states[-1, -1].tolist()


def test_the_same_states_give_the_same_bytes(states: Tensor, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_hidden_states(tmp_path / name, states.clone())
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_table_of_another_kind_and_a_truncated_one_are_refused(states: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "states.parquet"
    write_hidden_states(path, states)
    with pytest.raises(DamagedFile, match="'hidden-states/1' where 'gradients/1' was expected"):
        read_gradients(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match="not a readable Parquet table"):
        read_hidden_states(path)


def test_states_that_come_image_by_image_are_kept_by_layer_and_draw(tmp_path: Path) -> None:
    first, second = (torch.randn(2, images, 3, 4) for images in (1, 2))
    states = StatesByLayer(tmp_path)
    for layer, factor in ((5, 1.0), (7, 2.0)):
        states.add(layer, first * factor)
        states.add(layer, second * factor)
    assert states.layers == [5, 7]
    expected = torch.cat([first[0], second[0], first[1], second[1]])  # images fastest
    assert torch.equal(states.of(5), expected)
    assert torch.equal(states.of(7), 2 * expected)
    with pytest.raises(InputError, match=r"enters layer 7 as \[4, 4\] .* before are \[3, 4\]; images of several sizes"):
        states.add(7, torch.zeros(2, 1, 4, 4))
