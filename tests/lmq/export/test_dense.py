from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import lmq
from lmq.errors import InputError
from lmq.export.dense import export, problems
from lmq.export.source import QuantizedCheckpoint
from lmq.model.tensors import read_headers, read_tensors
from tests.lmq.export.small_checkpoints import logits, write_small


def _open(path: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model


def test_a_plain_model_with_the_very_values(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_model, tmp_path / "q")
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out")
    assert torch.equal(logits(_open(tmp_path / "out")), logits(lmq.load(tmp_path / "q", dense=True)))
    assert {step.relative_error for step in report.steps.values()} == {0.0}
    assert {step.target for step in report.steps.values()} == {"float32"}
    assert report.steps.keys() == checkpoint.specs.keys()
    assert report.size_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in tiny_model.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tiny_model / name).read_text())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(tiny_qwen: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = write_small(tiny_qwen, tmp_path / "q")
    name = str(dtype).removeprefix("torch.")
    report = export(checkpoint, tmp_path / "out", dtype=name)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for path, step in report.steps.items():
        weight = checkpoint.weight(path)
        assert torch.equal(tensors[f"{path}.weight"], weight.to(dtype))
        error = (tensors[f"{path}.weight"].double() - weight.double()).norm() / weight.double().norm()
        assert step.relative_error == pytest.approx(float(error), rel=1e-4)
        assert step.target == name
    model = _open(tmp_path / "out")
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(lmq.load(tmp_path / "q", dtype=dtype, dense=True)))


def test_by_default_the_rest_is_kept_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    write_small(tiny_llama, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    floats = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("_range")}
    kept = {
        name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in floats.items() if "weight" in name
    }
    save_file({**load_file(file), **kept}, file, metadata={"format": "pt"})
    export(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(written[name].dtype == kept[name].dtype and torch.equal(written[name], kept[name]) for name in kept)
    assert {written[name].dtype for name in written.keys() - kept.keys()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_llama, tmp_path / "q")
    limit = 200_000
    export(checkpoint, tmp_path / "whole")
    export(checkpoint, tmp_path / "out", max_shard_bytes=limit)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= limit for shard in shards)
    whole, sharded = (read_tensors(read_headers(tmp_path / name).values()) for name in ("whole", "out"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert torch.equal(logits(_open(tmp_path / "out")), logits(_open(tmp_path / "whole")))


def test_a_checkpoint_of_a_base_model(tiny_llama: Path, tmp_path: Path) -> None:
    """Its tensors lack the first part of their names; those of the quantized matrices have it."""
    AutoModel.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    export(write_small(tmp_path / "base", tmp_path / "q"), tmp_path / "out")
    assert torch.equal(logits(_open(tmp_path / "out")), logits(lmq.load(tmp_path / "q", dense=True)))


def test_bad_input_is_named_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_llama, tmp_path / "q")
    with pytest.raises(InputError, match=r"unknown dtype 'float17'; did you mean 'float16'\? \(allowed: bfloat16, flo"):
        export(checkpoint, tmp_path / "out", dtype="float17")
    with pytest.raises(InputError, match="q exists already"):
        export(checkpoint, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight holds 100000, which float16 cannot; .* bfloat16"):
        export(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
