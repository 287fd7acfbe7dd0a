import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlavaConfig,
)

from lmq.errors import InputError, UnsupportedModel
from lmq.model.discovery import discover
from lmq.model.source import ModelSource, locate, source_digest
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure

LLAMA_PARTS = {
    "self_attn.q_proj": "attn_in",
    "self_attn.k_proj": "attn_in",
    "self_attn.v_proj": "attn_in",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_gate",
    "mlp.down_proj": "mlp_down",
}
PHI_PARTS = {
    "self_attn.o_proj": "attn_out",
    "self_attn.qkv_proj": "attn_in",
    "mlp.gate_up_proj": "mlp_gate",
    "mlp.down_proj": "mlp_down",
}


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_structure_agrees_with_the_loaded_model(tiny_model: Path) -> None:
    structure = discover(tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert structure.architecture == type(plain).__name__
    assert (structure.layers_path, structure.layers, structure.hidden_size) == ("model.layers", 4, 64)
    assert (structure.vocabulary_size, structure.dtype) == (512, "float32")
    for module in structure.modules:
        weight = plain.get_submodule(structure.path(module.id)).weight
        assert weight.shape == (module.out_features, module.in_features)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    assert structure.parameters + structure.other_parameters == parameters
    assert structure.other_bytes == 4 * structure.other_parameters
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    assert structure.weights_sha256 == source_digest(locate(ModelSource.parse(str(tiny_model))))


def test_tensors_that_transformers_renames_are_found(tmp_path: Path) -> None:
    """An untied GPT-NeoX keeps its head as `embed_out`."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, vocab_size=96, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path)
    structure = discover(tmp_path)
    assert not structure.tied_embeddings
    hidden = torch.randn(1, 5, 64)
    streamed = StreamedModel.open(tmp_path, structure)
    expected = model.lm_head(model.gpt_neox.final_layer_norm(hidden))
    torch.testing.assert_close(streamed.head_logits(hidden), expected)


@pytest.mark.parametrize(
    ("name", "tied", "parts"),
    [
        ("tiny_llama", False, LLAMA_PARTS),
        ("tiny_qwen", True, LLAMA_PARTS),
        ("tiny_gemma", True, LLAMA_PARTS),
        ("tiny_phi", False, PHI_PARTS),
    ],
)
def test_parts_and_tied_embeddings(name: str, tied: bool, parts: dict, request: pytest.FixtureRequest) -> None:
    structure = discover(request.getfixturevalue(name), weights_sha256="0")
    assert structure.tied_embeddings is tied
    for layer in range(structure.layers):
        assert {module.id.kind: module.part for module in structure.in_layer(layer)} == parts


HYBRID_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "options", "notes"),
    [
        (
            "bamba",
            {
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 8,
                "mamba_n_groups": 1,
                "attn_layer_indices": [1],
            },
            ["mamba.conv1d.weight [144, 1, 4] of layers 0, 2"],
        ),
        (
            "falcon_mamba",
            {"state_size": 8},
            ["mixer.A_log [128, 8] of layers 0-2", "mixer.conv1d.weight [128, 1, 4] of layers 0-2"],
        ),
        (
            "recurrent_gemma",
            {"lru_width": 64, "block_types": ["recurrent", "attention"], "head_dim": 16},
            [
                "temporal_block.conv_1d.weight [64, 1, 4] of layers 0, 2",
                *(
                    f"temporal_block.rg_lru.{gate}_gate_{part} {shape} of layers 0, 2"
                    for gate in ("input", "recurrent")
                    for part, shape in (("weight", [4, 16, 16]), ("bias", [4, 16]))
                ),
            ],
        ),
    ],
)
def test_what_a_hybrid_keeps_is_listed(kind: str, options: dict, notes: list[str], tmp_path: Path) -> None:
    """Its projections are quantized; what is listed, the vectors and the embeddings are all the rest."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HYBRID_SHAPE, **options))
    model.save_pretrained(tmp_path)
    structure = discover(tmp_path, weights_sha256="0")
    assert structure.kept_notes == notes
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    blocks = model.get_submodule(structure.layers_path)
    matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim > 1)
    assert structure.parameters + sum(tensor.parameters for tensor in structure.kept) == matrices


def test_a_model_that_keeps_nothing_says_nothing_of_it(tiny_llama: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    assert structure.kept_notes == []
    assert "kept" not in structure.to_json()


def test_a_head_that_is_stored_beside_the_embedding_is_tied_only_if_it_is_the_same(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_qwen, tmp_path / "copy")
    change_tensors(
        copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    assert discover(copy).tied_embeddings
    change_tensors(copy, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert not discover(copy).tied_embeddings


def test_sixteen_bit_checkpoints_count_two_bytes(llama_copy: Path) -> None:
    change_tensors(llama_copy, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    structure = discover(llama_copy)
    assert structure.dtype == "bfloat16"
    assert structure.other_bytes == 2 * structure.other_parameters


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)),
            r"transformer\.h\.0\.attn\.c_attn is a Conv1D with weight of shape \[32, 96\]",
        ),
        (
            lambda: Llama4ForCausalLM(
                Llama4TextConfig(
                    hidden_size=32,
                    intermediate_size=64,
                    intermediate_size_mlp=64,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=16,
                    num_local_experts=4,
                    vocab_size=64,
                    pad_token_id=0,
                    moe_layers=[0],
                )
            ),
            r"feed_forward\.experts is a Llama4TextExperts with gate_up_proj of shape \[4, 32, 128\]",
        ),
    ],
)
def test_weights_outside_linear_are_refused_by_name(model, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        discover(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(model_type="none-such"), "describes no model that transformers has"),
        (lambda config: config.update(model_type="t5"), "cannot be built as a language model"),
        (
            lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
            r"is quantized already \(gptq\); pass the full-precision model",
        ),
        (lambda config: config.update(num_hidden_layers=5), r"lacks 9 of the 48 tensors .*model\.layers\.4\."),
        (lambda config: config.update(intermediate_size=96), "does not belong to its configuration"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(llama_copy: Path, change, message: str) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    change(config)
    (llama_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        discover(llama_copy)


def test_a_configuration_that_transformers_cannot_build_is_refused(tmp_path: Path) -> None:
    """LLaVA looks for the embedding of its language model where OPT has none."""
    text = {"model_type": "opt", "vocab_size": 512, "hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2}
    config = LlavaConfig(text_config=text | {"num_attention_heads": 4}, architectures=["LlavaForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"cannot be built as a language model: .*embed_tokens"):
        discover(tmp_path)


def test_integer_weights_are_refused(llama_copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(llama_copy, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.up_proj\.weight is stored as I8"):
        discover(llama_copy)


def test_a_truncated_file_is_named(llama_copy: Path) -> None:
    file = llama_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        discover(llama_copy)


def test_sharded_checkpoints_are_read_and_a_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="200KB")
    structure, single = discover(tmp_path, weights_sha256="0"), discover(tiny_llama, weights_sha256="0")
    assert structure == single
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of {len(shards)} shards \({shards[1].name}"):
        discover(tmp_path)
