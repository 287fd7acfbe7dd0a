import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmq.errors import InputError
from lmq.evaluation import side_by_side
from lmq.evaluation.side_by_side import compare_models
from lmq.evaluation.whole_model import evaluate_checkpoint, text_windows
from tests.conftest import TINY_SHAPE

TEXT: dict[str, Any] = {"text": "pydoc-topics", "column": "text", "tokens": 120, "window": 40, "stride": 40}


@pytest.fixture
def shallower(tiny_llama: Path, tmp_path: Path) -> Path:
    """Another model of the same tokenizer, with fewer layers."""
    path = tmp_path / "shallower"
    LlamaForCausalLM(LlamaConfig(**{**TINY_SHAPE, "num_hidden_layers": 2})).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


def plain_divergence(path: Path, reference: Path) -> tuple[float, float]:
    """KL in nats per token and top-1 agreement, all of a window's logits at once, in float64."""
    own, full = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (path, reference))
    _, seen = text_windows(reference, **TEXT)
    with torch.no_grad():
        logits, expected = (model(seen.long()).logits[:, :-1].double() for model in (own, full))
    ours, theirs = logits.log_softmax(-1), expected.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return kl.mean().item(), (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()


def test_each_model_is_judged_against_the_reference(tiny_llama: Path, shallower: Path) -> None:
    first, second = compare_models([tiny_llama, shallower], tiny_llama, **TEXT)
    assert first.evaluation is not None
    assert second.evaluation is not None
    assert first.evaluation.kl_divergence is None
    assert second.evaluation.kl_divergence is not None
    kl, agreement = plain_divergence(shallower, tiny_llama)
    assert second.evaluation.kl_divergence.value == pytest.approx(kl, rel=1e-4)
    assert second.evaluation.top1_agreement == pytest.approx(agreement)
    for found in (first, second):
        assert found.evaluation is not None
        alone = evaluate_checkpoint(found.path, **TEXT)
        assert found.evaluation.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-5)
        assert found.disk_bytes == sum(file.stat().st_size for file in found.path.iterdir())
        assert found.note is found.error is None


def test_the_reference_is_run_once_and_may_be_none_of_them(
    tiny_llama: Path, shallower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = side_by_side.open_reference
    monkeypatch.setattr(side_by_side, "open_reference", lambda path, seen: opened.append(path) or real(path, seen))
    shutil.copytree(shallower, tmp_path / "copy")
    found = compare_models([shallower, tmp_path / "copy"], tiny_llama, **TEXT)
    assert opened == [tiny_llama]
    assert [model.evaluation for model in found] == [found[0].evaluation] * 2


def test_models_of_another_vocabulary_have_no_divergence(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["lmq"])
    tokenizer.save_pretrained(other)
    wide = tmp_path / "wide"
    LlamaForCausalLM(LlamaConfig(**{**TINY_SHAPE, "vocab_size": 520})).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(wide)
    _, tokens, logits = compare_models([tiny_llama, other, wide], tiny_llama, **TEXT)
    for found in (tokens, logits):
        assert found.evaluation is not None
        assert found.evaluation.kl_divergence is found.evaluation.top1_agreement is None
    assert tokens.note is not None
    assert f"another than that of {tiny_llama}" in tokens.note
    assert "(501 tokens)" in tokens.note
    assert logits.note == f"it has 520 logits where {tiny_llama} has 512: no divergence"


def test_one_that_breaks_is_named_and_the_others_are_judged(tiny_llama: Path, shallower: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shallower, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    found = compare_models([broken, shallower], tiny_llama, **TEXT)
    assert found[0].evaluation is None
    assert found[0].error is not None
    assert "not finite" in found[0].error
    assert found[1].evaluation is not None


def test_what_is_no_model_is_refused_before_anything_is_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "evaluate_windows", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match="there is no model directory"):
        compare_models([tiny_llama, tmp_path / "lost"], tiny_llama, **TEXT)
