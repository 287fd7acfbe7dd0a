import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from lmq.errors import InputError, NotFiniteError, UnsupportedModel
from lmq.layers.importance.leave_one_out import leave_one_out
from lmq.layers.importance.removal import RemovalValue
from lmq.layers.importance.shapley import permutation_shapley, required_coalitions, window_shapley
from lmq.layers.importance.sublayers import find_sublayers, layer_groups
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from tests.mixtures import MIXTURES, mixture

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def game(path: Path, token_ids: Tensor, matmul_dtype: torch.dtype = torch.float32, **options: Any) -> RemovalValue:
    model = StreamedModel.open(path, discover(path, weights_sha256="0"))
    return RemovalValue(model, token_ids, matmul_dtype=matmul_dtype, **options)


def plain_loss(path: Path, token_ids: Tensor, removed_modules: Iterable[str]) -> float:
    """Loss of a whole model with the outputs of some modules zeroed by hooks."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    for name in removed_modules:
        model.get_submodule(name).register_forward_hook(zero)
    with torch.no_grad():
        logits = model(token_ids).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).item()


def everyone_but(removed: Iterable[int], players: int) -> frozenset[int]:
    return frozenset(range(players)) - frozenset(removed)


REMOVALS = [(), (0,), (1,), (7,), (2, 3), (0, 5), (3, 4, 5), (0, 1, 6), tuple(range(8))]


@pytest.mark.parametrize("coalitions_at_once", [1, 4, 16])
def test_values_equal_a_plain_forward_with_hooks(tiny_model: Path, token_ids: Tensor, coalitions_at_once: int) -> None:
    value = game(tiny_model, token_ids, coalitions_at_once=coalitions_at_once)
    value.measure([everyone_but(removed, 8) for removed in REMOVALS])
    checked = REMOVALS if coalitions_at_once == 4 else REMOVALS[4:6]
    for removed in checked:
        modules = [f"model.layers.{p // 2}.{('self_attn', 'mlp')[p % 2]}" for p in removed]
        expected = plain_loss(tiny_model, token_ids, modules)
        assert -value(everyone_but(removed, 8)) == pytest.approx(expected, rel=1e-5)
    assert value.loss == -value(frozenset(range(8)))


def test_what_gemma_adds_after_its_second_norm_is_zero_too(tiny_gemma: Path, token_ids: Tensor) -> None:
    modules = ["model.layers.1.post_attention_layernorm", "model.layers.2.post_feedforward_layernorm"]
    expected = plain_loss(tiny_gemma, token_ids, modules)
    assert -game(tiny_gemma, token_ids)(everyone_but([2, 5], 8)) == pytest.approx(expected, rel=1e-5)


def test_removing_a_layer_is_deleting_it(tiny_llama: Path, token_ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    del model.model.layers[2]
    with torch.no_grad():
        logits = model(token_ids, use_cache=False).logits[:, :-1]
    shorter = nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).item()
    value = game(tiny_llama, token_ids)
    losses = leave_one_out(value, 8, layer_groups(4))
    assert losses[2] == pytest.approx(shorter - value.loss, abs=1e-5)


def save(model: PreTrainedModel, path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**SHAPE, intermediate_size=64, use_parallel_residual=True, tie_word_embeddings=True)
    )


def phi() -> PreTrainedModel:
    return PhiForCausalLM(PhiConfig(**SHAPE, intermediate_size=64))


def opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=True))


@pytest.mark.parametrize(
    ("make", "layers", "attention", "mlp"),
    [
        (gpt_neox, "gpt_neox.layers", "attention", "mlp"),
        (phi, "model.layers", "self_attn", "mlp"),
        (opt, "model.decoder.layers", "self_attn", "fc2"),
    ],
)
def test_parallel_residuals_and_mlps_without_a_module_of_their_own(
    make: Callable[[], PreTrainedModel], layers: str, attention: str, mlp: str, token_ids: Tensor, tmp_path: Path
) -> None:
    path = save(make(), tmp_path / "model")
    value = game(path, token_ids)
    assert [player.paths for player in value.players] == [(attention,), (mlp,)] * 2
    for removed, modules in (((0,), [f"0.{attention}"]), ((1, 2), [f"0.{mlp}", f"1.{attention}"])):
        expected = plain_loss(path, token_ids, [f"{layers}.{module}" for module in modules])
        assert -value(everyone_but(removed, 4)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_of_a_layer_are_one_sublayer(family: str, token_ids: Tensor, tmp_path: Path) -> None:
    mixture(family).save_pretrained(tmp_path)
    value = game(tmp_path, token_ids)
    last = len(value.players) // 2 - 1
    modules = {"granite-moe": ["block_sparse_moe"], "granite-moe-shared": ["block_sparse_moe", "shared_mlp"]}
    removed = [f"model.layers.{last}.{module}" for module in modules.get(family, ["mlp"])]
    expected = plain_loss(tmp_path, token_ids, removed)
    assert -value(everyone_but([2 * last + 1], len(value.players))) == pytest.approx(expected, rel=1e-5)


def test_a_norm_behind_the_sum_is_no_residual_stream(token_ids: Tensor, tmp_path: Path) -> None:
    config = OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False)
    path = save(OPTForCausalLM(config), tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"block 0 \(OPTDecoderLayer\) does not return its input"):
        game(path, token_ids)


def test_a_block_without_attention_is_named(tiny_llama: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    modules = [info for info in structure.modules if info.id.layer != 2 or not info.part.startswith("attn")]
    with pytest.raises(UnsupportedModel, match="block 2 of LlamaForCausalLM has no attention"):
        find_sublayers(replace(structure, modules=tuple(modules)))


def test_work_is_shared_and_counted(tiny_llama: Path, token_ids: Tensor) -> None:
    value = game(tiny_llama, token_ids, coalitions_at_once=100)
    assert value.work.block_runs == value.work.block_runs_without_reuse == value.work.block_loads == 4
    value.measure([everyone_but(removed, 8) for removed in ((4,), (4, 7), (6,))])
    # layer 2 once without player 4; layer 3 after it with and without player 7, and without 6
    assert value.work.block_runs - 4 == 1 + 3
    assert value.work.block_runs_without_reuse == 4 * 4
    assert value.work.block_loads == 4 + 2
    before = value.work
    value(everyone_but((4, 7), 8))
    assert value.work == before


def test_measuring_beforehand_leaves_nothing_for_the_estimator(tiny_llama: Path, token_ids: Tensor) -> None:
    together, alone = game(tiny_llama, token_ids), game(tiny_llama, token_ids)
    together.measure(required_coalitions(lambda value: window_shapley(value, 8, level=3)))
    done = together.work
    assert done.evaluations == 1 + 8 + 7 + 6
    estimates = window_shapley(together, 8, level=3)
    assert together.work == done
    assert estimates == pytest.approx(window_shapley(alone, 8, level=3), abs=1e-12)
    assert done.block_runs < alone.work.block_runs < alone.work.block_runs_without_reuse


def test_permutations_run_on_a_model(tiny_llama: Path, token_ids: Tensor) -> None:
    value = game(tiny_llama, token_ids)
    estimates = permutation_shapley(value, 8, permutations=2)
    total = sum(estimate.value for estimate in estimates if estimate.value is not None)
    assert total == pytest.approx(value(frozenset(range(8))) - value(frozenset()), abs=1e-9)


def test_bfloat16_products_come_near(tiny_llama: Path, token_ids: Tensor) -> None:
    full = game(tiny_llama, token_ids)
    fast = game(tiny_llama, token_ids, matmul_dtype=torch.bfloat16)
    coalition = everyone_but([3], 8)
    assert fast(coalition) != full(coalition)
    assert fast(coalition) == pytest.approx(full(coalition), rel=0.02)


def test_bad_input_is_refused(tiny_llama: Path, token_ids: Tensor) -> None:
    with pytest.raises(InputError, match="coalitions_at_once = 0 is not allowed"):
        game(tiny_llama, token_ids, coalitions_at_once=0)
    with pytest.raises(InputError, match="there is no player 8; the model has 8 sub-layers"):
        game(tiny_llama, token_ids)(frozenset({8}))


def test_states_that_stop_being_finite_name_the_layer(tiny_llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match="states that leave layer 2"):
        game(path, token_ids)
