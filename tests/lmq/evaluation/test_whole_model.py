import json
import pydoc_data.topics
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lmq
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.write import quantized_bytes, write_checkpoint
from lmq.errors import InputError, LmqError, NotFiniteError
from lmq.evaluation.perplexity import full_windows
from lmq.evaluation.whole_model import (
    evaluate_checkpoint,
    reference_logits,
    require_same_model,
    score_whole_model,
    stored_bytes,
)
from lmq.evaluation.windows import last_states, score_windows, window_tokens
from lmq.export import export_format
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model import streaming
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.quantizers import quantizer
from lmq.text.calibration import text_prefix
from tests.lmq.evaluation.plain_perplexity import plain_perplexity

TOKENS = 150


def text_tokens(path: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:4])
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:TOKENS])


def quantize(source: Path, path: Path) -> PreTrainedModel:
    structure = discover(source, weights_sha256="0")
    choice = dict(zip((module.id for module in structure.modules), cycle(STOPS)))
    write_checkpoint(path, source, structure, choice, quantizer("rtn"))
    return lmq.load(path, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_perplexity_of_a_directory_equals_the_plain_loop(tiny_model: Path, kind: str, tmp_path: Path) -> None:
    path = tiny_model if kind == "plain" else tmp_path / "out"
    model = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        if kind == "plain"
        else quantize(tiny_model, path)
    )
    found = evaluate_checkpoint(path, text="pydoc-topics", column="text", tokens=TOKENS, window=50, stride=25)
    prefix = text_prefix(AutoTokenizer.from_pretrained(tiny_model))
    expected = plain_perplexity(model, text_tokens(tiny_model), 50, 25, prefix)
    assert found.perplexity.value == pytest.approx(expected, rel=1e-4)
    assert found.perplexity.stderr is not None
    assert (found.kl_divergence, found.top1_agreement) == (None, None)
    assert found.scored_tokens == TOKENS - 1


def test_the_text_can_be_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"body": "The first document, of two."}\n{"body": "The second one."}\n')
    found = evaluate_checkpoint(tiny_llama, text=str(text), column="body", tokens=1000, window=10, stride=5)
    assert found.perplexity.value > 1
    with pytest.raises(InputError, match="fewer than one window of 500"):
        evaluate_checkpoint(tiny_llama, text=str(text), column="body", tokens=1000, window=500, stride=5)


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def with_damaged_config(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("break_it", [without_config, with_damaged_config])
def test_a_directory_without_a_model_is_refused(
    tiny_llama: Path, break_it: Callable[[Path], None], tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(InputError):
        evaluate_checkpoint(tmp_path / "model", text="pydoc-topics", column="text", tokens=99, window=50, stride=25)


def test_a_missing_directory_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(InputError, match=r"no model directory .*/chekpoint; did you mean .*/checkpoint\?"):
        evaluate_checkpoint(tmp_path / "chekpoint", text="pydoc-topics", column="text", tokens=9, window=5, stride=5)


def test_a_model_that_breaks_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.full((64, 128), 1e38)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match="leave layer 1 are not finite"):
        evaluate_checkpoint(tmp_path / "model", text="pydoc-topics", column="text", tokens=99, window=50, stride=25)


@pytest.mark.parametrize("logits_at_once", [512 * 7, 1 << 24])
def test_a_whole_model_scores_as_its_blocks_do(
    tiny_model: Path, logits_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the vocabulary is too large to hold the logits of a window at once."""
    structure = discover(tiny_model, weights_sha256="0")
    quantize(tiny_model, tmp_path / "out")
    full = StreamedModel.open(tiny_model, structure)
    windows = full_windows(64, 24, 8)
    tokens = window_tokens(text_tokens(tiny_model).int(), windows, [0])
    reference = last_states(full, tokens)
    blocks = QuantizedBlocks(tmp_path / "out", structure)
    expected = score_windows(full, windows, tokens, last_states(full, tokens, blocks.put_in), reference)
    monkeypatch.setattr(streaming, "_LOGITS_AT_ONCE", logits_at_once)
    whole = lmq.load(tmp_path / "out", dtype=torch.float32, dense=True)
    found = score_whole_model(whole, windows, tokens, reference_logits(full, reference))
    for row, one in zip(found, expected, strict=True):
        assert row.pop("prefix") == one.pop("prefix") == [0]
        assert row.pop("kl") == pytest.approx(one.pop("kl"), rel=1e-3, abs=1e-6)
        assert row == pytest.approx(one, rel=1e-4)
    assert all(row["kl_sum"] > 0 for row in found)


def test_a_token_outside_the_vocabulary_is_refused(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with pytest.raises(InputError, match="token 512 is outside the model's vocabulary of 512; is the tokenizer"):
        score_whole_model(model, full_windows(8, 8, 8), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 512]]))


def test_divergence_from_a_reference_directory(tiny_qwen: Path, tmp_path: Path) -> None:
    model = quantize(tiny_qwen, tmp_path / "out")
    options = {"text": "pydoc-topics", "column": "text", "tokens": 60, "window": 60, "stride": 60}
    found = evaluate_checkpoint(tmp_path / "out", reference=tiny_qwen, **options)
    full = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    seen = text_tokens(tiny_qwen)[None, :60]
    with torch.no_grad():
        log_p, log_q = (each(seen).logits[0, :-1].double().log_softmax(-1) for each in (full, model))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert found.kl_divergence.value == pytest.approx(float(expected.mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    itself = evaluate_checkpoint(tiny_qwen, reference=tiny_qwen, **options)
    assert itself.kl_divergence.value == pytest.approx(0, abs=1e-6)


def plain_quantization_config(path: Path, fields: dict[str, object]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))


AQLM = {"quant_method": "aqlm"}
VPTQ = {"quant_method": "vptq"}


@pytest.mark.parametrize("fields", [AQLM, VPTQ], ids=["aqlm", "vptq"])
def test_a_missing_kernel_package_is_named(tiny_llama: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    plain_quantization_config(tmp_path / "model", fields)
    with pytest.raises(LmqError, match=rf"model is quantized by {fields['quant_method']}, and a package .* is missing"):
        evaluate_checkpoint(tmp_path / "model", text="pydoc-topics", column="text", tokens=99, window=50, stride=25)


def test_a_method_that_nobody_knows_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    plain_quantization_config(tmp_path / "model", {"quant_method": "magic"})
    with pytest.raises(LmqError, match="model is quantized by magic, which this transformers does not open"):
        evaluate_checkpoint(tmp_path / "model", text="pydoc-topics", column="text", tokens=99, window=50, stride=25)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "auto-round", "awq"])
def test_what_others_store_is_evaluated_by_the_same_code(format_name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The export has the checkpoint's codes, scales rounded to the type it stores them in."""
    structure = discover(tiny_llama, weights_sha256="0")
    choice = {module.id: QuantSpec(4, 64) for module in structure.modules}
    whole = quantizer("rtn", integer_zeros=True)
    write_checkpoint(tmp_path / "lmq", tiny_llama, structure, choice, whole)
    exporter = export_format(format_name).exporter()
    exporter.export(QuantizedCheckpoint(tmp_path / "lmq"), tmp_path / "theirs")
    options = {"text": "pydoc-topics", "column": "text", "tokens": 60, "window": 30, "stride": 30}
    ours, theirs = (evaluate_checkpoint(tmp_path / name, **options) for name in ("lmq", "theirs"))
    assert theirs.perplexity.value == pytest.approx(ours.perplexity.value, rel=2e-2)
    matrices, _ = stored_bytes(tmp_path / "theirs", structure)
    assert 0.5 < matrices / structure.parameters < 0.75  # 4-bit codes, scales, zeros, and shapes or g_idx


def test_sizes_are_those_of_the_files(tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    quantize(tiny_qwen, tmp_path / "out")
    matrices, files = stored_bytes(tmp_path / "out", structure)
    assert matrices == quantized_bytes(tmp_path / "out")
    assert files == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert stored_bytes(tiny_qwen, structure)[0] == 4 * structure.parameters


def test_another_model_is_refused(tiny_llama: Path, tiny_gemma: Path, tmp_path: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    require_same_model(tiny_llama, tiny_llama, structure)
    shutil.copytree(tiny_llama, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(InputError, match="its num_hidden_layers is 5, the model's is 4"):
        require_same_model(tmp_path / "wide", tiny_llama, structure)


def test_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "model")
    structure = discover(tiny_llama, weights_sha256="0")
    with pytest.raises(InputError, match="has another tokenizer than the model"):
        require_same_model(tmp_path / "model", tiny_llama, structure)
