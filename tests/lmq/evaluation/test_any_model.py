"""Perplexity of models that cannot be quantized or read block by block, against a plain loop; encoders are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lmq.errors import InputError
from lmq.evaluation import whole_model
from lmq.evaluation.whole_model import evaluate_checkpoint
from lmq.model.discovery import discover
from lmq.text.calibration import TextSource, documents, load_tokenizer, token_stream
from tests.conftest import TINY_SHAPE
from tests.lmq.evaluation.plain_perplexity import plain_perplexity

TOKENS, WINDOW, STRIDE = 120, 40, 20
SMALL = {**TINY_SHAPE, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 32,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}  # fmt: skip


def _saved(kind: str, options: dict[str, Any], tokenizer_of: Path, place: Path, *, head: bool = True) -> Path:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SMALL, **options})
    (AutoModelForCausalLM if head else AutoModel).from_config(config).save_pretrained(place)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, place / file.name)
    return place


def _evaluate(path: Path, **options: Any) -> Any:
    return evaluate_checkpoint(
        path, text="pydoc-topics", column="text", tokens=TOKENS, window=WINDOW, stride=STRIDE, **options
    )


@pytest.mark.parametrize("logits_at_once", [1 << 24, 512 * 7], ids=["whole windows", "seven tokens at a time"])
@pytest.mark.parametrize("kind", MODELS)
def test_perplexity_of_whatever_transformers_opens(
    kind: str, logits_at_once: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(kind, MODELS[kind], tiny_llama, tmp_path / kind)
    monkeypatch.setattr(whole_model, "tokens_at_once", lambda vocabulary: logits_at_once // vocabulary)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stream = token_stream(documents(TextSource()), load_tokenizer(path), TOKENS)
    assert _evaluate(path).perplexity.value == pytest.approx(plain_perplexity(model, stream, WINDOW, STRIDE), rel=1e-4)


def test_such_a_model_can_be_the_reference(tiny_llama: Path, tmp_path: Path) -> None:
    path = _saved("gpt_bigcode", MODELS["gpt_bigcode"], tiny_llama, tmp_path / "model")
    found = _evaluate(path, reference=path)
    assert (found.kl_divergence.value, found.top1_agreement) == (pytest.approx(0, abs=1e-6), 1)
    other = _saved("gpt_bigcode", {**MODELS["gpt_bigcode"], "vocab_size": 520}, tiny_llama, tmp_path / "other")
    with pytest.raises(InputError, match="is not a checkpoint of this model: its vocab_size is 512"):
        _evaluate(path, reference=other)


@pytest.mark.parametrize(
    ("kind", "head", "message"),
    [
        ("roberta", True, "reads its text both ways, as encoders do"),
        ("electra", True, "reads its text both ways, as encoders do"),
        ("distilbert", False, "is a distilbert model .* has no kind that predicts the next token"),
        ("t5", False, "is a t5 model .* has no kind that predicts the next token"),
    ],
)
def test_encoders_are_refused_by_name(kind: str, head: bool, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    small = {"n_layers": 2, "dim": 64, "hidden_dim": 64, "n_heads": 4} if kind == "distilbert" else {}
    path = _saved(kind, small, tiny_llama, tmp_path / kind, head=head)
    with pytest.raises(InputError, match=message) as refused:
        _evaluate(path)
    assert len(str(refused.value)) < 400


def test_a_hybrid_is_quantized_but_for_its_convolutions(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "block_ff_dim": 128}
    path = _saved("lfm2", options, tiny_llama, tmp_path / "lfm2")
    structure = discover(path, weights_sha256="not needed")
    assert "conv.in_proj" in structure.kinds
    assert not any(kind.endswith("conv.conv") for kind in structure.kinds)
    assert structure.kept_notes == ["conv.conv.weight [64, 1, 3] of layer 0"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stream = token_stream(documents(TextSource()), load_tokenizer(path), TOKENS)
    assert _evaluate(path).perplexity.value == pytest.approx(plain_perplexity(model, stream, WINDOW, STRIDE), rel=1e-4)
