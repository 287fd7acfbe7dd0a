"""What is read is what transformers reads, for every layout of files and names."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter

from lmq.errors import InputError, UnsupportedModel
from lmq.model.discovery import discover, find_layers
from lmq.model.stored import StoredModel, read_stored_model
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.model.tensors import INDEX_FILE, SINGLE_FILE, weight_files

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make(model_type: str, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **options})
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config).float().eval()


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / SINGLE_FILE)
    change(tensors)
    save_file(tensors, path / SINGLE_FILE, metadata={"format": "pt"})


def assert_read_as_transformers(path: Path) -> StoredModel:
    """Every tensor of the model that plain transformers opens, value for value; those that it has tied are tied."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    stored = read_stored_model(path)
    expected = plain.state_dict()
    found = stored.read(name for name in expected if stored.holds(name))
    assert expected.keys() - found.keys() <= {name for name, _ in plain.named_buffers()}
    for name, value in found.items():
        assert torch.equal(value.float(), expected[name].float()), name
    for name, source in stored.model.all_tied_weights_keys.items():
        is_tied = expected[name].data_ptr() == expected[source].data_ptr()
        assert (stored.tensors[name] == stored.tensors[source]) is is_tied
    return stored


LAYOUTS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt_neox, renamed head": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "falcon": {},
    "cohere2": {"num_key_value_heads": 2},
    "olmo_hybrid, joined convolutions": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("layout", ["single", "sharded", "base model", "own names"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_tensors_are_those_of_transformers(kind: str, layout: str, tmp_path: Path) -> None:
    model = make(kind.partition(",")[0], **LAYOUTS[kind])
    if layout == "base model":
        model.base_model.save_pretrained(tmp_path)
        model.config.save_pretrained(tmp_path)
        if not model.config.tie_word_embeddings:
            with pytest.raises(UnsupportedModel, match=r"lacks 1 of the .*lm_head|lacks 1 of the .*embed_out"):
                read_stored_model(tmp_path)
            return
    else:
        options = {"sharded": {"max_shard_size": "20KB"}, "own names": {"save_original_format": False}}.get(layout, {})
        model.save_pretrained(tmp_path, **options)
    assert (tmp_path / INDEX_FILE).is_file() == (layout == "sharded")
    assert assert_read_as_transformers(tmp_path).surplus == {}


def test_the_text_of_a_multimodal_model_is_found_under_its_stored_names(tmp_path: Path) -> None:
    make_gemma3().save_pretrained(tmp_path)
    stored = assert_read_as_transformers(tmp_path)
    assert set(stored.headers) - set(stored.tensors)  # stored under other names
    assert find_layers(stored.model) == "model.language_model.layers"
    assert discover(tmp_path, weights_sha256="0").layers == 2


def test_joined_tensors_are_read_by_name(tmp_path: Path) -> None:
    make("olmo_hybrid", num_key_value_heads=2).save_pretrained(tmp_path)
    stored = read_stored_model(tmp_path)
    (name,) = {name for name in stored.conversions if ".0." in name}
    assert len(stored.conversions[name].sources) == 3
    assert stored.read([name])[name].shape == stored.model.state_dict()[name].shape


@pytest.mark.parametrize(
    ("kind", "stored_names", "name"),
    [
        ("phi3", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        ("phi3", ("gate_proj", "up_proj"), "gate_up_proj"),
        ("gpt_neox", ("query", "key", "value"), "query_key_value"),
    ],
)
def test_a_matrix_that_is_joined_from_stored_ones_is_read_but_not_quantized(
    kind: str, stored_names: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path)
    own_names = [own for own in model.state_dict() if own.endswith(f".{name}.weight")]

    def split(tensors: dict[str, torch.Tensor]) -> None:
        for own in own_names:
            pieces = tensors.pop(own).chunk(len(stored_names))
            tensors |= {
                own.replace(name, part): piece.clone() for part, piece in zip(stored_names, pieces, strict=True)
            }

    change_tensors(tmp_path, split)
    joined = WeightConverter([f".{part}.weight" for part in stored_names], f".{name}.weight", [Concatenate(dim=0)])
    monkeypatch.setattr(
        sys.modules["transformers.conversion_mapping"],
        "get_model_conversion_mapping",
        lambda model: [*get_model_conversion_mapping(model), joined],
    )
    values = read_stored_model(tmp_path).read(own_names)
    assert all(torch.equal(values[own], model.state_dict()[own]) for own in own_names)
    with pytest.raises(
        UnsupportedModel, match=rf"{name}.weight is not stored as the model uses it, .*save_pretrained\("
    ):
        discover(tmp_path, weights_sha256="0")


@pytest.mark.parametrize("newer", ["single", "index"])
def test_a_single_file_wins_over_an_index_as_in_transformers(newer: str, tmp_path: Path) -> None:
    first, second = make("llama"), make("llama")
    with torch.no_grad():
        second.model.norm.weight.mul_(3)
    single, sharded = (first, second) if newer == "index" else (second, first)
    sharded.save_pretrained(tmp_path, max_shard_size="20KB")
    single.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / SINGLE_FILE, tmp_path)
    assert (tmp_path / INDEX_FILE).is_file()
    assert weight_files(tmp_path) == (tmp_path / SINGLE_FILE,)
    stored = assert_read_as_transformers(tmp_path)
    assert torch.equal(stored.read(["model.norm.weight"])["model.norm.weight"], single.model.norm.weight)


def test_the_file_that_the_configuration_names_wins_over_all(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["model.norm.weight"].mul_(2))
    (tmp_path / SINGLE_FILE).rename(tmp_path / "second.safetensors")
    make("llama").save_pretrained(tmp_path / "first")
    shutil.copy(tmp_path / "first" / SINGLE_FILE, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "second.safetensors"}))
    assert weight_files(tmp_path) == (tmp_path / "second.safetensors",)
    assert_read_as_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "../second.safetensors"}))
    with pytest.raises(InputError, match=r"names '\.\./second\.safetensors' as its weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "cohere", "gemma"])
def test_a_head_of_its_own_is_kept_apart_and_a_double_is_tied(kind: str, tmp_path: Path) -> None:
    make(kind, num_key_value_heads=2, tie_word_embeddings=True, head_dim=8).save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert discover(tmp_path, weights_sha256="0").tied_embeddings
    assert_read_as_transformers(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert not discover(tmp_path, weights_sha256="0").tied_embeddings
    assert_read_as_transformers(tmp_path)


SURPLUS = {
    "prediction head": {"mtp.fc.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)},
    "layer numbered on": {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)},
    "buffer of an earlier version": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "value head": {"v_head.summary.weight": torch.ones(1, 32)},
}


@pytest.mark.parametrize("surplus", SURPLUS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_surplus_tensors_are_told_apart_and_counted(kind: str, surplus: str, tmp_path: Path) -> None:
    make(kind, num_key_value_heads=2, head_dim=8).save_pretrained(tmp_path)
    before = discover(tmp_path, weights_sha256="0")
    change_tensors(tmp_path, lambda tensors: tensors.update(SURPLUS[surplus]))
    assert set(assert_read_as_transformers(tmp_path).surplus) == set(SURPLUS[surplus])
    after = discover(tmp_path, weights_sha256="0")
    assert after.layers == before.layers
    assert after.other_bytes - before.other_bytes == sum(tensor.nbytes for tensor in SURPLUS[surplus].values())


@pytest.mark.parametrize("wide", ["lm_head.weight", "model.embed_tokens.weight", "norm"])
def test_sizes_are_those_of_the_file(wide: str, tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if wide in n}))
    structure = discover(tmp_path, weights_sha256="0")
    data = sum(tensor.nbytes for tensor in load_file(tmp_path / SINGLE_FILE).values())
    assert structure.dtype == "bfloat16"
    assert structure.other_bytes == data - 2 * structure.parameters


@pytest.mark.parametrize("wide", ["layers.0.", "down_proj", "q_proj", "nothing"])
def test_the_size_of_the_matrices_is_that_of_the_file(wide: str, tmp_path: Path) -> None:
    """Some of them in float32, as finetuning and merging leave them."""
    make("llama", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if wide in n}))
    structure = discover(tmp_path, weights_sha256="0")
    matrices = {f"{structure.path(module.id)}.weight" for module in structure.modules}
    stored = load_file(tmp_path / SINGLE_FILE)
    assert structure.dtype == "bfloat16"
    assert structure.source_bytes == sum(stored[name].nbytes for name in matrices)
    assert structure.source_bytes + structure.other_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert ("stored_bytes" in structure.to_json()) == (wide != "nothing")
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


@pytest.mark.parametrize("kind", ["modernbert-decoder", "bart", "gpt_bigcode"])
def test_blocks_are_found_whatever_the_model_calls_its_decoder(kind: str, tmp_path: Path) -> None:
    options = {"bart": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}}
    model = make(kind, **options.get(kind, {}))
    expected = {"modernbert-decoder": "model.layers", "bart": "model.decoder.layers", "gpt_bigcode": "transformer.h"}
    assert find_layers(model) == expected[kind]


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model", "t5"])
def test_other_kinds_of_models_are_refused_without_a_list_of_classes(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind)
    config.architectures = ["SomethingElse"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=rf"no model of type {kind} that predicts the next token") as caught:
        read_stored_model(tmp_path)
    assert len(str(caught.value)) < 400
    assert "SomethingElse" in str(caught.value)


def test_a_streamed_model_of_joined_and_renamed_tensors_gives_the_states_of_transformers(tmp_path: Path) -> None:
    make_gemma3().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    streamed = StreamedModel.open(tmp_path, discover(tmp_path, weights_sha256="0"))
    ids = torch.arange(4, 14)[None]
    hidden = streamed.embed(ids)
    inputs = streamed.block_inputs(10)
    with torch.no_grad():
        for layer in range(2):
            with streamed.block(layer) as block:
                hidden = inputs[layer].run(block, hidden)
        torch.testing.assert_close(streamed.head_logits(hidden), plain(ids).logits, rtol=1e-4, atol=1e-5)
