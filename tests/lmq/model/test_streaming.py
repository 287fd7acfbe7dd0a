import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lmq.model.streaming
from lmq.errors import InputError, NotFiniteError, UnsupportedModel
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel

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


def test_the_loss_gradient_does_not_depend_on_how_many_logits_are_held(
    tiny_gemma: Path, token_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = open_streamed(tiny_gemma)
    hidden = torch.randn(SEQUENCES, LENGTH, 64, generator=torch.Generator().manual_seed(3))
    whole = streamed.loss_gradient(hidden, token_ids)
    monkeypatch.setattr(lmq.model.streaming, "_LOGITS_AT_ONCE", 5 * 512)
    pieces = streamed.loss_gradient(hidden, token_ids)
    assert pieces.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    torch.testing.assert_close(pieces.gradient, whole.gradient)
    assert not pieces.gradient[:, -1].any()


def test_block_inputs_fit_one_sequence_length_and_layers_that_differ(tiny_gemma: Path) -> None:
    inputs = open_streamed(tiny_gemma).block_inputs(LENGTH)
    sliding, full = inputs[0].kwargs, inputs[1].kwargs
    assert sliding["attention_mask"].shape[-2:] == (LENGTH, LENGTH)
    assert full["attention_mask"] is None
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_a_block_is_released_and_the_callers_changes_are_forgotten(tiny_llama: Path) -> None:
    streamed = open_streamed(tiny_llama)
    with streamed.block(1) as block:
        original = block.mlp.down_proj.weight.clone()
        block.mlp.down_proj = nn.Identity()
    assert all(parameter.is_meta for parameter in block.parameters())
    with streamed.block(1) as block:
        assert torch.equal(block.mlp.down_proj.weight, original)
        assert not block.mlp.down_proj.weight.requires_grad


def test_blocks_can_be_held_in_bfloat16(tiny_qwen: Path, token_ids: Tensor) -> None:
    streamed = StreamedModel.open(tiny_qwen, discover(tiny_qwen, weights_sha256="0"), dtype=torch.bfloat16)
    states = run_blocks(streamed, streamed.embed(token_ids))
    assert states[-1].dtype == torch.bfloat16
    expected = run_blocks(open_streamed(tiny_qwen), open_streamed(tiny_qwen).embed(token_ids))
    assert nn.functional.cosine_similarity(states[-1].float(), expected[-1], dim=-1).min() > 0.99


def test_two_models_can_be_read_in_two_threads(tiny_llama: Path, tiny_gemma: Path, token_ids: Tensor) -> None:
    def logits(path: Path) -> Tensor:
        streamed = open_streamed(path)
        with torch.no_grad():
            return streamed.head_logits(run_blocks(streamed, streamed.embed(token_ids))[-1])

    paths = [tiny_llama, tiny_gemma] * 3
    expected = {path: logits(path) for path in set(paths)}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for path, found in zip(paths, pool.map(logits, paths), strict=True):
            assert torch.equal(found, expected[path])


def tables(model: StreamedModel) -> list[Tensor]:
    model.embed(torch.tensor([[1, 2]]))
    return [model._model.get_input_embeddings().weight, model._model.get_output_embeddings().weight]


def test_models_that_are_open_at_once_hold_embedding_and_head_once(tiny_llama: Path) -> None:
    structure = discover(tiny_llama, embeddings=True)
    first, second = (StreamedModel.open(tiny_llama, structure) for _ in range(2))
    half = StreamedModel.open(tiny_llama, structure, dtype=torch.bfloat16)
    for mine, others, smaller in zip(tables(first), tables(second), tables(half), strict=True):
        assert mine.data_ptr() == others.data_ptr() != smaller.data_ptr()
    before = tables(second)[0].clone()
    first.put_embedding(structure.embeddings[0], torch.zeros_like(before))
    assert tables(second)[0].equal(before)
    assert not tables(first)[0].any()


def test_tables_of_a_file_that_was_written_anew_are_read_anew(tiny_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    first = StreamedModel.open(copy, discover(copy))
    before = tables(first)[0].clone()
    changed = {name: 2 * tensor for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    assert tables(StreamedModel.open(copy, discover(copy)))[0].equal(2 * before)


def test_a_token_outside_the_vocabulary_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="token 512 is outside the model's vocabulary of 512"):
        open_streamed(tiny_llama).embed(torch.tensor([[1, 512]]))


def test_layer_weights_are_the_models_own(tiny_phi: Path) -> None:
    weights = load_layer_weights(tiny_phi, discover(tiny_phi, weights_sha256="0"), 2)
    plain = open_plain(tiny_phi).model.layers[2]
    assert set(weights) == {"self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert all(torch.equal(weight, plain.get_submodule(kind).weight) for kind, weight in weights.items())


def test_weights_that_are_not_finite_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    structure = discover(broken, weights_sha256="0")
    with pytest.raises(NotFiniteError, match=r"layer 2 mlp\.up_proj holds 1 elements"):
        load_layer_weights(broken, structure, 2)
    streamed = StreamedModel.open(broken, structure)
    with pytest.raises(NotFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"), streamed.block(2):
        pass


class BlockWithTokenInput(nn.Module):
    """A model whose blocks are given the embeddings again, as models with per-layer embeddings do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *, inputs_embeds: Tensor, **kwargs: object) -> object:
        return self.inner(inputs_embeds=inputs_embeds, per_layer_input=inputs_embeds, **kwargs)


def test_blocks_that_take_inputs_made_of_the_tokens_are_refused(tiny_llama: Path) -> None:
    streamed = open_streamed(tiny_llama)
    inner = streamed._model
    wrapped = BlockWithTokenInput(inner)
    wrapped.get_input_embeddings = inner.get_input_embeddings  # type: ignore[assignment]
    streamed._model = wrapped  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match=r"takes an input \(per_layer_input\) that depends on the tokens"):
        streamed.block_inputs(LENGTH)
