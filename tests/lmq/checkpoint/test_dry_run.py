"""What cannot be measured is refused before anything is measured, by the property that is lacking."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmq.checkpoint.dry_run import dry_run
from lmq.errors import InputError, UnsupportedModel
from lmq.formats.packed_layer import QuantizedLinear
from lmq.model.discovery import discover
from lmq.model.structure import ModuleId

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def saved(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def make(model_type: str, **options) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**SHAPE, **options})
    return AutoModelForCausalLM.from_config(config).float().eval()


def try_model(path: Path) -> tuple[ModuleId, ...]:
    return dry_run(path, discover(path, weights_sha256="0"))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", {}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
        ("falcon", {}),
        ("olmo", {"clip_qkv": 4.0}),
        ("gpt_bigcode", {}),
        ("nanochat", {"num_key_value_heads": 2}),
        ("modernbert-decoder", {}),
    ],
)
def test_models_that_work_pass(model_type: str, options: dict, tmp_path: Path) -> None:
    assert try_model(saved(make(model_type, **options), tmp_path)) == ()


@pytest.mark.parametrize(
    ("model_type", "options", "layers"),
    [
        ("mamba", {"state_size": 8}, [0, 1]),
        ("falcon_mamba", {"state_size": 8}, [0, 1]),
        (
            "jamba",
            {
                "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 2,
                "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
            },
            [0],
        ),
    ],
)  # fmt: skip
def test_a_module_whose_weight_is_used_without_a_call_is_kept(
    model_type: str, options: dict, layers: list[int], tmp_path: Path
) -> None:
    """Nothing can be measured of it. Sizes of quantized and other weights still add up to the file's."""
    path = saved(make(model_type, **options), tmp_path)
    never_called = try_model(path)
    assert [module.layer for module in never_called] == layers
    assert {module.kind.rpartition(".")[2] for module in never_called} == {"dt_proj"}
    before, after = discover(path, weights_sha256="0"), discover(path, weights_sha256="0", kept=never_called)
    assert {info.id for info in before.modules} - {info.id for info in after.modules} == set(never_called)
    assert {tensor.name for tensor in after.kept} - {tensor.name for tensor in before.kept} == {
        f"{module.kind}.weight" for module in never_called
    }
    assert after.source_bytes + after.other_bytes == before.source_bytes + before.other_bytes
    assert dry_run(path, after) == ()


def test_a_module_that_is_called_twice_is_refused(tmp_path: Path, monkeypatch) -> None:
    model = make("llama")
    path, mlp = saved(model, tmp_path), type(model.model.layers[0].mlp)
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, states: original(self, states) + original(self, 2 * states))
    with pytest.raises(UnsupportedModel, match=r"block 0 of LlamaForCausalLM calls mlp\.gate_proj 2 times"):
        try_model(path)


GEMMA_WITH_EMBEDDINGS_PER_LAYER = {
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        (
            "gemma3n_text",
            {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
            r"blocks of Gemma3nForCausalLM take states of shape \[2, 1, 2, 64\] where .* is \[1, 2, 64\]",
        ),
        (
            "gemma4_text",
            {"global_head_dim": 16},
            r"Gemma4ForCausalLM cannot be run block by block: .* its blocks take inputs that depend on the tokens",
        ),
    ],
)
def test_gemmas_with_embeddings_per_layer_are_refused(
    model_type: str, options: dict, message: str, tmp_path: Path
) -> None:
    path = saved(make(model_type, **GEMMA_WITH_EMBEDDINGS_PER_LAYER, **options), tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        try_model(path)


def test_a_gemma_4_without_them_passes(tmp_path: Path) -> None:
    options = {**GEMMA_WITH_EMBEDDINGS_PER_LAYER, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    try_model(saved(make("gemma4_text", **options), tmp_path))


def block_class(model: PreTrainedModel) -> type:
    return type(model.get_decoder().layers[0])


def test_blocks_that_take_inputs_made_of_the_tokens_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = saved(make("llama"), tmp_path)
    original = transformers.models.llama.modeling_llama.LlamaModel.forward

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return original(self, inputs_embeds=embeds, per_layer_input=embeds * 2, **options)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedModel, match=r"takes an input \(per_layer_input\) that depends on the tokens"):
        try_model(path)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "roformer"])
def test_encoders_are_refused_unless_they_are_set_to_read_one_way(model_type: str, tmp_path: Path) -> None:
    """They have a head for the next token, and a perplexity that means nothing."""
    options = {"embedding_size": 64} if model_type in ("electra", "roformer") else {}
    with pytest.raises(InputError, match=r"\w+ reads its text both ways, as encoders do"):
        try_model(saved(make(model_type, **options), tmp_path / "encoder"))
    try_model(saved(make(model_type, **options, is_decoder=True), tmp_path / "decoder"))


def test_blocks_that_stop_the_gradient_are_refused(tmp_path: Path, monkeypatch) -> None:
    model = make("qwen2", num_key_value_heads=2)
    path, block = saved(model, tmp_path), block_class(model)
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, states, *a, **k: original(self, states.detach(), *a, **k))
    with pytest.raises(UnsupportedModel, match=r"block 0 of Qwen2ForCausalLM lets no gradient through"):
        try_model(path)


def test_blocks_that_change_the_shape_are_refused(tmp_path: Path, monkeypatch) -> None:
    model = make("mistral", num_key_value_heads=2)
    path, block = saved(model, tmp_path), block_class(model)
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, states, *a, **k: original(self, states, *a, **k)[:, :2])
    with pytest.raises(UnsupportedModel, match=r"block 0 .* makes states of shape \[1, 2, 64\] of \[1, 4, 64\]"):
        try_model(path)


def test_classes_that_cannot_be_opened_with_other_layers_are_refused(tmp_path: Path, monkeypatch) -> None:
    model = make("qwen3", num_key_value_heads=2, head_dim=16)
    path = saved(model, tmp_path)

    def touch(self, module):
        if isinstance(getattr(module, "q_proj", None), QuantizedLinear):
            module.q_proj.inner_weight.fill_(1)

    monkeypatch.setattr(type(model), "_init_weights", touch)
    monkeypatch.setattr(type(model.model), "_init_weights", touch)
    with pytest.raises(UnsupportedModel, match="does not open with quantized layers"):
        try_model(path)


def test_blocks_that_fail_on_states_alone_are_refused(tmp_path: Path, monkeypatch) -> None:
    model = make("gemma", num_key_value_heads=2, head_dim=16)
    path, block = saved(model, tmp_path), block_class(model)

    def forward(self, states, *args, **kwargs):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(UnsupportedModel, match=r"hidden states.*IndexError: index out of range"):
        try_model(path)


def test_no_weight_of_a_block_is_read(tmp_path: Path) -> None:
    path = saved(make("llama"), tmp_path)
    structure = discover(path, weights_sha256="0")
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if ".layers." in name:
            tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    dry_run(path, structure)
