"""Models whose layers compute with their number, or with how many there are, are not pruned into other models."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmq.errors import UnsupportedModel
from lmq.layers.prune import check_prunable, write_pruned
from lmq.model.discovery import discover

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make(path: Path, kind: str, **options) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **options})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return path


def prune(path: Path, removed: list[int]) -> Path:
    target = path.parent / "pruned"
    write_pruned(path, discover(path, weights_sha256="0"), removed, target)
    return target


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("olmo2", {"num_key_value_heads": 2}),
        ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1, 0]}),
        ("cohere2", {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gpt_bigcode", {}),
    ],
)
def test_models_without_such_constants_are_pruned(kind: str, options: dict, tmp_path: Path) -> None:
    path = make(tmp_path / "model", kind, **options)
    check_prunable(path, discover(path, weights_sha256="0"))
    opened = AutoModelForCausalLM.from_pretrained(prune(path, [1]), dtype=torch.float32)
    assert opened.config.num_hidden_layers == 3


def test_constants_of_a_layer_that_follow_from_its_number(tmp_path: Path) -> None:
    """λ of DiffLlama."""
    path = make(tmp_path / "model", "diffllama", num_key_value_heads=4)
    with pytest.raises(UnsupportedModel, match=r"self_attn\.lambda_init of layer 1 would be 0\.2\S* instead of 0\.3"):
        check_prunable(path, discover(path, weights_sha256="0"))
    with pytest.raises(UnsupportedModel, match=r"self_attn\.lambda_init of layer 2"):
        prune(path, [1])
    assert not (tmp_path / "pruned").exists()
    prune(path, [3])  # those that are left keep their numbers


MAMBA = {"num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "jamba",
            {**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1},
            "all of layer 1 would be JambaMambaDecoderLayer instead of JambaAttentionDecoderLayer in its new place 0",
        ),
        (
            "recurrent_gemma",
            {"lru_width": 32, "block_types": ["recurrent", "attention"], "head_dim": 8},
            r"temporal_block of layer 1 would be RecurrentGemmaRecurrentBlock instead of RecurrentGemma\w*Attention",
        ),
        (
            "modernbert-decoder",
            {"global_attn_every_n_layers": 2},
            "attn_norm of layer 1 would be Identity instead of LayerNorm in its new place 0",
        ),
    ],
)
def test_hybrids_whose_kinds_of_layers_follow_from_their_numbers(
    kind: str, options: dict, message: str, tmp_path: Path
) -> None:
    """The configuration says a period, not layer by layer."""
    path = make(tmp_path / "model", kind, num_key_value_heads=2, **options)
    with pytest.raises(UnsupportedModel, match=message):
        prune(path, [0])
    assert not (tmp_path / "pruned").exists()


def test_hybrids_that_list_their_kinds_of_layers_are_pruned(tmp_path: Path) -> None:
    path = make(
        tmp_path / "model", "lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2, block_ff_dim=64
    )
    opened = AutoModelForCausalLM.from_pretrained(prune(path, [0, 3]), dtype=torch.float32)
    assert opened.config.layer_types == ["full_attention", "conv"]


def test_scales_by_the_number_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MiniCPM scales what its sub-layers add; here computed from the configuration in every call."""
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    original = block.forward

    def forward(self, states, *args, **kwargs):
        scale = self.self_attn.config.num_hidden_layers**-0.5
        return states + scale * (original(self, states, *args, **kwargs) - states)

    monkeypatch.setattr(block, "forward", forward)
    path = make(tmp_path / "model", "llama")
    with pytest.raises(UnsupportedModel, match="layer 1 computes something else in a model of fewer layers"):
        check_prunable(path, discover(path, weights_sha256="0"))
    with pytest.raises(UnsupportedModel, match="layer 0 computes something else"):
        prune(path, [3])


def test_attention_scaled_by_the_layers_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPT-2's `scale_attn_by_inverse_layer_idx`, computed from the number in every call."""
    block = transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer
    original = block.forward

    def forward(self, states, *args, **kwargs):
        return original(self, states / (1 + self.self_attn.layer_idx), *args, **kwargs)

    monkeypatch.setattr(block, "forward", forward)
    path = make(tmp_path / "model", "qwen2", num_key_value_heads=2)
    with pytest.raises(UnsupportedModel, match="layer 2 computes something else"):
        prune(path, [1])
    prune(path, [3])


def test_windows_by_number_that_only_long_texts_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.mistral.modeling_mistral.MistralAttention
    original = attention.__init__

    def init(self, config, layer_idx):
        original(self, config, layer_idx)
        self.window = 4096 if layer_idx % 2 else 0

    monkeypatch.setattr(attention, "__init__", init)
    path = make(tmp_path / "model", "mistral", num_key_value_heads=2)
    with pytest.raises(UnsupportedModel, match=r"self_attn\.window of layer 2 would be 4096 instead of 0"):
        prune(path, [1])
    prune(path, [1, 2])  # each of the others finds a place of its own kind


def test_a_scale_of_the_embedding_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.models.granite.modeling_granite.GraniteModel
    original = model.forward

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return original(self, inputs_embeds=embeds * self.config.num_hidden_layers, **options)

    monkeypatch.setattr(model, "forward", forward)
    path = make(tmp_path / "model", "granite", num_key_value_heads=2)
    with pytest.raises(UnsupportedModel, match="the embedding computes something else"):
        check_prunable(path, discover(path, weights_sha256="0"))


def test_surplus_tensors_are_left_out(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "llama")
    tensors = load_file(path / "model.safetensors")
    surplus = {"mtp.fc.weight": torch.ones(2, 2), "model.layers.4.mlp.up_proj.weight": torch.ones(64, 32)}
    save_file({**tensors, **surplus}, path / "model.safetensors", metadata={"format": "pt"})
    pruned = prune(path, [0])
    assert json.loads((pruned / "config.json").read_text())["num_hidden_layers"] == 3
    names = set(load_file(pruned / "model.safetensors"))
    assert not names & surplus.keys()
    assert names == {name for name in tensors if ".layers.3." not in name}
