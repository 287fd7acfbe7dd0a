"""Which channels a block lets be rescaled, and that it computes the same afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmq.model.channels import TRIED_TOKENS, SharedChannels, shared_channels
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from tests.mixtures import MIXTURES

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


def found_in(model_dir: Path, layer: int = 1) -> list[SharedChannels]:
    structure = discover(model_dir)
    model = StreamedModel.open(model_dir, structure)
    kinds = [module.id.kind for module in structure.in_layer(layer)]
    with model.block(layer) as block:
        direct = {name for name, _ in block.named_parameters()}
        return shared_channels(block, model.block_inputs(TRIED_TOKENS)[layer], structure.hidden_size, kinds, direct)


@pytest.mark.parametrize(
    ("name", "norm_offset", "repeats", "head_size"),
    [("tiny_llama", 0, 1, 64), ("tiny_qwen", 0, 2, 16), ("tiny_gemma", 1, 4, 16)],
)
def test_channels_of_norms_values_and_up_projections_are_found(
    name: str, norm_offset: int, repeats: int, head_size: int, request: pytest.FixtureRequest
) -> None:
    found = {shared.source: shared for shared in found_in(request.getfixturevalue(name))}
    before_mlp = "pre_feedforward_layernorm" if name == "tiny_gemma" else "post_attention_layernorm"
    assert {source: shared.takers for source, shared in found.items()} == {
        "self_attn.v_proj": ("self_attn.o_proj",),
        "mlp.up_proj": ("mlp.down_proj",),
        "input_layernorm": QKV,
        before_mlp: GATED,
    }
    assert found["input_layernorm"].offset == norm_offset
    values = found["self_attn.v_proj"]
    assert (values.repeats, values.head_size) == (repeats, head_size)


def test_of_fused_matrices_what_enters_is_found(tiny_phi: Path) -> None:
    assert {(shared.source, shared.takers) for shared in found_in(tiny_phi)} == {
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    }


def test_a_norm_whose_channels_a_router_takes_too_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model"
    MIXTURES["mixtral"]().save_pretrained(path)
    sources = {shared.source for shared in found_in(path, 0)}
    assert "input_layernorm" in sources
    assert "post_attention_layernorm" not in sources


def test_tensors_that_may_not_change_are_left_alone(tiny_llama: Path) -> None:
    structure = discover(tiny_llama)
    model = StreamedModel.open(tiny_llama, structure)
    kinds = [module.id.kind for module in structure.in_layer(0)]
    with model.block(0) as block:
        direct = {name for name, _ in block.named_parameters() if name != "input_layernorm.weight"}
        found = shared_channels(block, model.block_inputs(TRIED_TOKENS)[0], structure.hidden_size, kinds, direct)
    assert "input_layernorm" not in {shared.source for shared in found}
    assert len(found) == 3


def test_values_are_repeated_by_heads() -> None:
    shared = SharedChannels(source="v", takers=("o",), repeats=2, head_size=2)
    repeated = shared.repeated(torch.arange(4.0))
    assert repeated.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert shared.pooled(repeated + torch.tensor([0, 0, 2, 2, 0, 0, 0, 0.0])).tolist() == [1, 2, 2, 3]
