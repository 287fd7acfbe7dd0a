"""What is written opens by plain `from_pretrained` and computes what was measured, or it is not kept."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lmq
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.reopen import check_opens, sample_logits
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import LmqError
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel, sample_inputs
from lmq.quantizers import quantizer

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
RTN = quantizer("rtn")
KINDS = {
    "gpt_bigcode": {},
    "nanochat": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "gpt_neox": {"tie_word_embeddings": False},
    "cohere": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def make(path: Path, kind: str, **options) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **options})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return path


def write(source: Path, target: Path) -> Path:
    structure = discover(source, weights_sha256="0")
    write_checkpoint(target, source, structure, {info.id: QuantSpec(8, 64) for info in structure.modules}, RTN)
    return target


@torch.no_grad()
def expected_logits(source: Path, checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Plain transformers on the source with the dequantized matrices copied in."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    reader = QuantizedCheckpoint(checkpoint)
    for path in reader.specs:
        plain.get_submodule(path).weight.copy_(reader.weight(path))
    return plain(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_open_and_compute_what_they_should(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, **KINDS[kind])
    checkpoint = write(source, tmp_path / "checkpoint")
    ids = torch.arange(4, 24)[None]
    expected = expected_logits(source, checkpoint, ids)
    with torch.no_grad():
        for opened in (
            lmq.load(checkpoint, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        ):
            torch.testing.assert_close(opened(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite"])
def test_surplus_tensors_come_along_and_do_not_keep_it_from_opening(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, num_key_value_heads=2, tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(64, 128)
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.randn(64, 64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = write(source, tmp_path / "checkpoint")
    kept = load_file(checkpoint / "model.safetensors")
    assert torch.equal(kept["mtp.fc.weight"], tensors["mtp.fc.weight"])
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        found = lmq.load(checkpoint, dtype=torch.float32, verify=True)(ids).logits
    torch.testing.assert_close(found, expected_logits(source, checkpoint, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole_bytes", [0, 10**9], ids=["block by block", "whole"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt_bigcode"])
def test_other_values_are_found(kind: str, whole_bytes: int, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    structure = discover(source, weights_sha256="0")
    checkpoint = write(source, tmp_path / "checkpoint")
    blocks = QuantizedBlocks(checkpoint, structure)
    measured = sample_logits(StreamedModel.open(source, structure), prepare=blocks.put_in)
    check_opens(checkpoint, measured, structure, whole_bytes=whole_bytes)
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("norm.weight", "ln_f.weight")))
    tensors[name] = tensors[name] * 3
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LmqError, match=r"opens, but its logits differ by"):
        check_opens(checkpoint, measured, structure, whole_bytes=whole_bytes)
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LmqError, match=r"does not open again .*so it was not kept"):
        check_opens(checkpoint, measured, structure, whole_bytes=whole_bytes)


def test_a_checkpoint_that_does_not_open_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self):
        raise AttributeError("'QuantizedLinear' object has no attribute 'weight'")

    source = make(tmp_path / "source", "gpt_bigcode")
    monkeypatch.setattr(QuantizedLinear, "weight", property(fail))
    with pytest.raises(LmqError, match="GPTBigCodeForCausalLM does not open again"):
        write(source, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("vocabulary_size", [16, 512, 49_152, 262_144])
def test_sample_tokens_are_in_the_vocabulary_of_any_size(vocabulary_size: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size, num_hidden_layers=0))
    tokens = sample_inputs(model)
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary_size
