from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmq
from lmq.errors import InputError
from lmq.export.report import ModuleStep, overall_relative_error, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.groups import to_groups
from lmq.formats.packed_layer import QuantizedLinear
from lmq.model.tensors import read_tensors
from tests.lmq.export.small_checkpoints import write_small


@pytest.mark.parametrize("axis", [0, 1])
def test_matrices_are_those_of_the_opened_checkpoint(tiny_model: Path, tmp_path: Path, axis: int) -> None:
    checkpoint = write_small(tiny_model, tmp_path / "q", axis=axis)
    model = lmq.load(tmp_path / "q")
    quantized = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantized.keys() == checkpoint.specs.keys() == checkpoint.shapes.keys()
    for path, module in quantized.items():
        weight = module.dequantize()
        codes, grid = checkpoint.codes(path), checkpoint.grid(path)
        assert torch.equal(checkpoint.weight(path), weight)
        assert codes.shape == weight.shape == checkpoint.shapes[path]
        assert torch.equal(grid.dequantize(to_groups(codes, grid.spec.group_size, axis)), weight)
        assert int(codes.max()) < 2 ** checkpoint.specs[path].bits


def test_the_rest_is_that_of_the_source(tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_qwen, tmp_path / "q")
    source = load_file(tiny_qwen / "model.safetensors")
    kept = read_tensors(checkpoint.unquantized.values())
    assert source.keys() - kept.keys() == {f"{path}.weight" for path in checkpoint.specs}
    assert all(torch.equal(tensor, source[name]) for name, tensor in kept.items())
    assert checkpoint.model_config == json.loads((tiny_qwen / "config.json").read_text())


def test_dtype_is_that_of_most_weights(tiny_llama: Path, tmp_path: Path) -> None:
    assert write_small(tiny_llama, tmp_path / "q").dtype == torch.float32
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    assert QuantizedCheckpoint(tmp_path / "q").dtype == torch.bfloat16


def test_other_models_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a checkpoint written by lmq"):
        QuantizedCheckpoint(tiny_llama)
    with pytest.raises(InputError, match=r"has no config\.json"):
        QuantizedCheckpoint(tmp_path)


def test_relative_errors() -> None:
    original = torch.randn(30, 40, generator=torch.Generator().manual_seed(3))
    written = original.to(torch.bfloat16)
    error = (written.double() - original.double()).norm() / original.double().norm()
    assert relative_error(written, original) == pytest.approx(float(error), rel=1e-6)
    assert relative_error(original, original) == 0
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    steps = {name: ModuleStep(target="x", relative_error=error) for name, error in (("a", 0.1), ("b", 0.4))}
    assert overall_relative_error(steps, {"a": (2, 3), "b": (1, 2)}) == pytest.approx(
        ((6 * 0.1**2 + 2 * 0.4**2) / 8) ** 0.5
    )
    assert overall_relative_error({}, {}) == 0
