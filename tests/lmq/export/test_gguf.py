from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import lmq
from lmq.errors import InputError, LmqError
from lmq.export.gguf import export, problems
from lmq.export.gguf_blocks import GRID_BLOCKS, decode, encode
from lmq.export.openers import open_export
from lmq.export.report import ExportReport
from lmq.export.source import QuantizedCheckpoint
from tests.lmq.export.small_checkpoints import logits, write_small, write_types

FLOAT16_ROUNDING = 2**-11
GEMMA_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FEW_BITS = ("b4g32", "b3g64", "b2g32", "b4g64")


def open_gguf(report: ExportReport) -> PreTrainedModel:
    return open_export(report, "gguf")


def with_tokenizer(model: PreTrainedModel, path: Path, tokenizer_from: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512 weights, which K types are made of; grouped queries, tied embeddings."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return with_tokenizer(LlamaForCausalLM(config), tmp_path_factory.mktemp("wide"), tiny_llama)


@pytest.fixture(scope="module")
def gemma(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 as llama.cpp computes it: every sixth layer with full attention, no soft-capping."""
    config = Gemma3TextConfig(**GEMMA_SHAPE, num_hidden_layers=6)
    return with_tokenizer(Gemma3ForCausalLM(config), tmp_path_factory.mktemp("gemma"), tiny_gemma)


@pytest.fixture(scope="module")
def gemma2(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2: every second layer with full attention, both soft-cappings."""
    config = Gemma2Config(**GEMMA_SHAPE, num_hidden_layers=4, attn_logit_softcapping=20.0, final_logit_softcapping=10.0)
    return with_tokenizer(Gemma2ForCausalLM(config), tmp_path_factory.mktemp("gemma2"), tiny_gemma)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_phi", "wide_llama", "gemma", "gemma2"])
def test_transformers_reads_the_same_model(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = write_small(request.getfixturevalue(name), tmp_path / "q", *FEW_BITS)
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "m.gguf", fidelity="exact")
    assert {step.target for step in report.steps.values()} == {"Q4_1"}
    assert 0 < max(step.relative_error for step in report.steps.values()) < 4 * FLOAT16_ROUNDING
    assert report.size_bytes == report.path.stat().st_size
    expected, found = logits(lmq.load(tmp_path / "q", dense=True)), logits(open_gguf(report))
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    again = export(checkpoint, tmp_path / "again.gguf", fidelity="exact")
    assert again.path.read_bytes() == report.path.read_bytes()


def test_mxfp4_is_written_byte_for_byte(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_types(tiny_llama, tmp_path / "q", "mxfp4", "q8_0")
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "m.gguf")
    assert {step.relative_error for step in report.steps.values()} == {0.0}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type == GGMLQuantizationType.MXFP4
    path = "model.layers.0.mlp.down_proj"
    assert (down.data == checkpoint.blocks(path).blocks.numpy()).all()
    np.testing.assert_array_equal(gguf.dequantize(down.data, down.tensor_type), checkpoint.weight(path).numpy())
    expected, found = logits(lmq.load(tmp_path / "q", dense=True)), logits(open_gguf(report))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_the_gguf_package_reads_the_same_weights(wide_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(wide_llama, tmp_path / "q", "b4g32", "b8g64", "b4g32")
    report = export(checkpoint, tmp_path / "m.gguf")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for path, step in report.steps.items():
        _, _, layer, _, kind = path.split(".")
        if kind not in names:
            continue
        tensor = read[f"blk.{layer}.{names[kind]}.weight"]
        weight = checkpoint.weight(path).numpy()
        if kind in ("q_proj", "k_proj"):  # as llama.cpp's own converter permutes them
            heads = {"q_proj": 4, "k_proj": 2}[kind]
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert tensor.tensor_type.name == step.target == ("Q8_0" if checkpoint.specs[path].bits == 8 else "Q4_1")
        error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
        assert step.relative_error == pytest.approx(error, rel=1e-3)
        if step.target == "Q4_1":  # the very codes: what differs is the rounding of scale and offset to float16
            block = np.abs(weight).reshape(-1, 32).max(axis=1, keepdims=True)
            assert (np.abs(found - weight).reshape(-1, 32) <= 3 * FLOAT16_ROUNDING * block).all()


def test_lmq_loads_a_file(wide_llama: Path, tmp_path: Path) -> None:
    report = export(write_small(wide_llama, tmp_path / "lmq", "b4g32"), tmp_path / "model.gguf", fidelity="exact")
    assert torch.equal(logits(lmq.load(report.path)), logits(open_gguf(report)))
    with pytest.raises(InputError, match="there is no file"):
        lmq.load(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(LmqError, match=r"other.gguf does not open as a GGUF model"):
        lmq.load(tmp_path / "other.gguf")


@pytest.mark.parametrize("fidelity", ["exact", "size"])
def test_every_step_is_what_was_written(wide_llama: Path, tmp_path: Path, fidelity: str) -> None:
    checkpoint = write_small(wide_llama, tmp_path / "q", "b2g64", "b3g128", "b4g128", "b8g64", "b4g32")
    report = export(checkpoint, tmp_path / "m.gguf", fidelity=fidelity)
    opened = open_gguf(report)
    assert {step.target for step in report.steps.values()} == (
        {"Q4_1", "Q8_0"} | ({"Q2_K", "Q3_K", "Q4_K"} if fidelity == "size" else set())
    )
    for path, step in report.steps.items():
        weight = checkpoint.weight(path).double()
        written = opened.get_submodule(path).get_parameter("weight").detach().double()
        error = float((written - weight).norm() / weight.norm())
        assert step.relative_error == pytest.approx(error, rel=1e-3, abs=1e-7)
        limit = {"Q4_1": 2e-3, "Q8_0": 1e-2, "Q4_K": 0.05, "Q2_K": 0.12, "Q3_K": 0.25}[step.target]
        assert error < limit


def test_groups_of_32_keep_their_codes_whatever_the_fidelity(wide_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(wide_llama, tmp_path / "q", "b4g32")
    exact, size = (export(checkpoint, tmp_path / f"{name}.gguf", fidelity=name).path for name in ("exact", "size"))
    assert exact.read_bytes() == size.read_bytes()


@pytest.mark.parametrize("kind", sorted(GRID_BLOCKS, key=lambda kind: kind.name))
def test_blocks_are_those_that_the_gguf_package_reads(kind: GGMLQuantizationType) -> None:
    random = np.random.default_rng(0)
    levels = {"Q2_K": 4, "Q3_K": 8}.get(kind.name, 16)
    shape = (6, 512 // GRID_BLOCKS[kind])
    scale = random.uniform(0.5, 1.5, shape).astype(np.float32)
    minimum = -scale * random.uniform(0.3, 0.6, shape).astype(np.float32) * levels
    if kind.name == "Q3_K":
        minimum = -scale * 4
    codes = random.integers(0, levels, (*shape, GRID_BLOCKS[kind]))
    weight = (minimum[..., None] + scale[..., None] * codes).reshape(6, 512).astype(np.float32)
    rows = encode(weight, scale, minimum, levels, kind)
    assert rows.shape == gguf.quant_shape_to_byte_shape(weight.shape, kind)
    error = np.linalg.norm(decode(rows, kind) - weight) / np.linalg.norm(weight)
    assert error < {"Q4_1": 5e-4, "Q4_K": 0.02, "Q2_K": 0.06, "Q3_K": 0.05}[kind.name]
    flat = encode(np.zeros_like(weight), np.zeros_like(scale), np.zeros_like(minimum), levels, kind)
    assert not decode(flat, kind).any()


def test_the_tokenizer_gives_the_same_tokens(gemma: Path, tmp_path: Path) -> None:
    report = export(write_small(gemma, tmp_path / "q", "b4g32"), tmp_path / "m.gguf")
    read = gguf.GGUFReader(report.path)
    opened = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    own = AutoTokenizer.from_pretrained(gemma)
    text = "The decorator syntax in Python, since 2.4: @f\n  def g(): pass"
    assert opened(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
    assert read.get_field("tokenizer.ggml.add_bos_token").contents() is True
    assert read.get_field("general.architecture").contents() == "gemma3"


def test_what_gguf_cannot_hold_is_said_before_work(tiny_gemma: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_gemma, tmp_path / "q", "b4g32")
    found = problems(checkpoint)
    assert any("final_logit_softcapping is 30.0" in text for text in found)
    assert any("every 6th with full attention" in text for text in found)
    with pytest.raises(InputError, match=r"cannot be exported to GGUF: .*softcapping"):
        export(checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_widths_that_gguf_has_no_type_for_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_llama, tmp_path / "q", "b4g64", "b5g64")
    refused = r"GGUF: 5-bit codes; 2, 3, 4 and 8 bits are exported: \d+ modules \(.*layers? .*_proj"
    with pytest.raises(InputError, match=refused):
        export(checkpoint, tmp_path / "m.gguf")


def test_what_is_there_stays_and_what_fails_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_small(tiny_llama, tmp_path / "q", "b4g32")
    there = tmp_path / "m.gguf"
    there.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, there)
    assert there.read_text() == "mine"
    with pytest.raises(InputError, match=r"'exakt'; did you mean 'exact'\?"):
        export(checkpoint, tmp_path / "n.gguf", fidelity="exakt")

    def broken(self: QuantizedCheckpoint, path: str) -> torch.Tensor:
        raise OSError("disk full")

    monkeypatch.setattr(QuantizedCheckpoint, "weight", broken)
    with pytest.raises(OSError, match="disk full"):
        export(checkpoint, tmp_path / "n.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "q"]


def test_a_plan_for_llama_quantize_names_every_matrix_once(tiny_llama: Path, tmp_path: Path) -> None:
    """Twelve layers: layer 1 must not be taken for layer 11."""
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=12, tie_word_embeddings=True))
    source = with_tokenizer(model, tmp_path / "deep", tiny_llama)
    checkpoint = write_small(source, tmp_path / "q", "b2g64", "b3g64", "b4g64", "b8g64", "b3g64")
    report = export(checkpoint, tmp_path / "m.gguf", tensor_types=str(tmp_path / "types.txt"))
    assert f"llama-quantize --tensor-type-file {tmp_path / 'types.txt'} " in report.notes[-1]
    lines = [line.rpartition("=") for line in (tmp_path / "types.txt").read_text().splitlines()]
    names = [tensor.name for tensor in gguf.GGUFReader(report.path).tensors]
    kinds = {}
    for pattern, _, kind in lines:
        [name] = [name for name in names if re.search(pattern, name)]
        kinds[name] = kind
    assert len(kinds) == len(lines) == len(checkpoint.specs)
    for layer in range(12):
        bits = checkpoint.specs[f"model.layers.{layer}.self_attn.k_proj"].bits
        assert kinds[f"blk.{layer}.attn_k.weight"] == {2: "q2_k", 3: "q3_k", 4: "q4_k", 8: "q8_0"}[bits]
        bits = checkpoint.specs[f"model.layers.{layer}.mlp.down_proj"].bits  # rows of 64 weights
        assert kinds[f"blk.{layer}.ffn_down.weight"] == ("q8_0" if bits == 8 else "q4_0")
    assert set(kinds.values()) == {"q2_k", "q3_k", "q4_k", "q4_0", "q8_0"}
    with pytest.raises(InputError, match=r"types\.txt exists already"):
        export(checkpoint, tmp_path / "n.gguf", tensor_types=str(tmp_path / "types.txt"))
