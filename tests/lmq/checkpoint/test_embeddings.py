"""Checkpoints whose input embedding and output head are quantized: sizes, opening, exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import lmq
from lmq.checkpoint.dry_run import dry_run
from lmq.checkpoint.verify import checkpoint_sizes, find_damage
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError, UnsupportedModel
from lmq.export import write_export
from lmq.export.compressed_tensors import problems as problems_of_vllm
from lmq.export.hqq import problems as problems_of_hqq
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.packed_layer import QuantizedEmbedding, TiedHead
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.structure import EMBEDDINGS, ModelStructure, ModuleId
from lmq.model.unquantized import unquantized_parts
from lmq.quantizers import quantizer

BLOCKS, TABLES = QuantSpec(4, 64), QuantSpec(8, 32)
PROMPT = torch.arange(20, 32)[None]


def _checkpoint(model: Path, path: Path) -> tuple[Path, ModelStructure]:
    structure = discover(model, weights_sha256="not needed", embeddings=True)
    allocation = {module.id: TABLES if module.id.layer == EMBEDDINGS else BLOCKS for module in structure.quantized}
    write_checkpoint(path, model, structure, allocation, quantizer("rtn"))
    return path, structure


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen", "tiny_gemma"])
def test_sizes_are_counted_exactly_and_what_is_shared_is_stored_once(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(model)
    path, structure = _checkpoint(source, tmp_path / "made")
    counted = sum(
        (TABLES if module.id.layer == EMBEDDINGS else BLOCKS).size_bytes(module.parameters)
        for module in structure.quantized
    )
    sizes = checkpoint_sizes(path)
    assert sizes.quantized_bytes == counted
    assert sizes.unquantized_bytes == structure.other_bytes
    assert structure.source_bytes + structure.other_bytes == sum(
        parameter.numel() * parameter.element_size()
        for parameter in AutoModelForCausalLM.from_pretrained(source).parameters()
    )
    parts = {part.name: part.size_bytes for part in unquantized_parts(source, structure)}
    assert parts["embeddings"] == parts["lm_head"] == 0
    assert sum(parts.values()) == structure.other_bytes
    assert not list(find_damage(path))
    assert ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen"])
def test_what_was_opened_is_saved_and_opened_again(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path, structure = _checkpoint(request.getfixturevalue(model), tmp_path / "made")
    opened = lmq.load(path)
    expected = opened(PROMPT).logits
    opened.tie_weights()  # what users and trainers call now and then
    assert torch.equal(opened(PROMPT).logits, expected)
    opened.save_pretrained(tmp_path / "saved")
    again = lmq.load(tmp_path / "saved")
    assert torch.equal(again(PROMPT).logits, expected)
    assert isinstance(again.get_output_embeddings(), TiedHead) == structure.tied_embeddings
    generated = again.generate(PROMPT, max_new_tokens=4, do_sample=False)
    dense = lmq.load(path, dense=True)
    assert torch.equal(dense.generate(PROMPT, max_new_tokens=4, do_sample=False), generated)
    base = AutoModel.from_pretrained(path)
    assert isinstance(base.get_input_embeddings(), QuantizedEmbedding)
    assert base(PROMPT).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen"])
def test_exports_hold_them_or_say_so(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(model)
    path, structure = _checkpoint(source, tmp_path / "made")
    checkpoint = QuantizedCheckpoint(path)
    names = [module.id.kind for module in structure.embeddings]
    assert sorted(checkpoint.embeddings) == sorted(names)
    for problems in (problems_of_hqq, problems_of_vllm):
        about = [text for text in problems(checkpoint) if "embeddings" in text]
        assert len(about) == 1
        assert all(name in about[0] for name in names)
    with pytest.raises(InputError, match="quantizes no embeddings and no heads"):
        write_export(checkpoint, tmp_path / "hqq", "hqq", {})
    expected = lmq.load(path)(PROMPT).logits
    write_export(checkpoint, tmp_path / "plain", "safetensors", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(plain(PROMPT).logits, expected, atol=1e-3)


def test_gguf_holds_them(tiny_qwen: Path, tmp_path: Path) -> None:
    path, _ = _checkpoint(tiny_qwen, tmp_path / "made")
    report = write_export(
        QuantizedCheckpoint(path), tmp_path / "made.gguf", "gguf", {"tensor_types": str(tmp_path / "types")}
    )
    assert report.steps["model.embed_tokens"].target == "Q8_0"
    assert r"^token_embd\.weight$=q8_0" in (tmp_path / "types").read_text().splitlines()
    assert any("--token-embedding-type q8_0 --output-tensor-type q8_0" in note for note in report.notes)


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        do_layer_norm_before=False,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"rows of 16 where the hidden size is 32; leave out embeddings"):
        discover(tmp_path, weights_sha256="not needed", embeddings=True)


def test_errors_name_them() -> None:
    assert str(ModuleId(EMBEDDINGS, "lm_head")) == "lm_head"


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen", "tiny_gemma"])
def test_a_model_is_tried_with_them_before_anything_is_measured(model: str, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(model)
    assert dry_run(source, discover(source, weights_sha256="not needed", embeddings=True)) == ()


def test_a_class_that_works_on_the_table_itself_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(self: LlamaForCausalLM) -> None:
        self.model.embed_tokens.weight.data[self.model.embed_tokens.padding_idx].zero_()

    monkeypatch.setattr(LlamaForCausalLM, "initialize_weights", initialize)
    structure = discover(tiny_llama, weights_sha256="not needed", embeddings=True)
    with pytest.raises(UnsupportedModel, match="does not open with quantized layers"):
        dry_run(tiny_llama, structure)
