import shutil
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import nn

import lmq
from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import DamagedFile, InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure, ModuleId
from lmq.quantizers import quantizer


def mixed_choice(structure: ModelStructure) -> dict[ModuleId, QuantSpec]:
    return dict(zip((module.id for module in structure.modules), cycle(STOPS)))


def linear_weights(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}": module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def weights_put_in(path: Path, source: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    structure = discover(source, weights_sha256="0")
    streamed = StreamedModel.open(source, structure, dtype=dtype)
    quantized = QuantizedBlocks(path, structure)
    found: dict[str, torch.Tensor] = {}
    for layer in range(structure.layers):
        with streamed.block(layer) as block:
            quantized.put_in(block, layer)
            found |= linear_weights(block, f"model.layers.{layer}.")
            assert not any(parameter.requires_grad for parameter in block.parameters())
    return found


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_those_of_the_loaded_checkpoint(tiny_model: Path, axis: int, tmp_path: Path) -> None:
    structure = discover(tiny_model, weights_sha256="0")
    write_checkpoint(tmp_path / "out", tiny_model, structure, mixed_choice(structure), quantizer("rtn", axis=axis))
    loaded = linear_weights(lmq.load(tmp_path / "out", dtype=torch.float32, dense=True))
    found = weights_put_in(tmp_path / "out", tiny_model)
    assert found.keys() == loaded.keys() - {"lm_head"}
    assert all(torch.equal(weight, loaded[name]) for name, weight in found.items())


def test_modules_kept_unquantized_are_the_sources_and_the_dtype_is_the_blocks(tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    write_checkpoint(tmp_path / "out", tiny_qwen, structure, {ModuleId(2, "mlp.up_proj"): STOPS[3]}, quantizer("rtn"))
    found = weights_put_in(tmp_path / "out", tiny_qwen, torch.bfloat16)
    loaded = linear_weights(lmq.load(tmp_path / "out", dtype=torch.bfloat16, dense=True))
    assert all(torch.equal(weight, loaded[name]) for name, weight in found.items())
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def test_a_checkpoint_that_is_none_or_damaged_is_refused(tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    with pytest.raises(InputError, match="not a checkpoint written by lmq"):
        QuantizedBlocks(tiny_qwen, structure)
    write_checkpoint(tmp_path / "out", tiny_qwen, structure, mixed_choice(structure), quantizer("rtn"))
    shutil.copy(tiny_qwen / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(DamagedFile, match="lacks the tensor"):
        QuantizedBlocks(tmp_path / "out", structure)
