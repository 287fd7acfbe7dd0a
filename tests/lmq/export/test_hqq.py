from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

import lmq
import lmq.export.hqq as hqq_export
from lmq.allocation.budget import hqq_size_bytes
from lmq.errors import InputError
from lmq.export.hqq import export, problems
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import STOPS, QuantSpec
from tests.lmq.export.small_checkpoints import logits, write_small

FLOAT16_ROUNDING = 2**-11


def _open(path: Path) -> PreTrainedModel:
    return AutoHQQHFModel.from_quantized(str(path), compute_dtype=torch.float32, device="cpu", cache_dir=None)


def _states(path: Path) -> dict[str, dict[str, object]]:
    """The file as hqq's loader reads it: without running pickled code."""
    return torch.load(path / "qmodel.pt", weights_only=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_opens_the_same_model(tiny_model: Path, tmp_path: Path, axis: int) -> None:
    specs = [spec.name for spec in (*STOPS, QuantSpec(5, 64), QuantSpec(6, 64))]
    checkpoint = write_small(tiny_model, tmp_path / "q", *specs, axis=axis)
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out", dtype="float32")
    model, expected = _open(tmp_path / "out"), logits(lmq.load(tmp_path / "q", dense=True))
    assert {path for path, module in model.named_modules() if isinstance(module, HQQLinear)} == checkpoint.specs.keys()
    assert torch.allclose(logits(model), expected, atol=1e-5 * float(expected.abs().max()))
    assert {step.relative_error for step in report.steps.values()} == {0.0}
    assert report.size_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_and_zeros_take_16_bits_and_matrices_the_promised_bytes(
    tiny_qwen: Path, tmp_path: Path, axis: int
) -> None:
    checkpoint = write_small(tiny_qwen, tmp_path / "q", axis=axis)
    report = export(checkpoint, tmp_path / "out")
    states, model = _states(tmp_path / "out"), _open(tmp_path / "out")
    for path, spec in checkpoint.specs.items():
        tensors = [states[path][name] for name in ("W_q", "scale", "zero")]
        rows, columns = checkpoint.shapes[path]
        assert sum(tensor.nbytes for tensor in tensors) == hqq_size_bytes(rows * columns, spec, axis=axis)
        weight, written = checkpoint.weight(path).double(), model.get_submodule(path).dequantize().double()
        error = float((written - weight).norm() / weight.norm())
        assert report.steps[path].relative_error == pytest.approx(error, rel=1e-3)
        assert 0 < error < 4 * FLOAT16_ROUNDING
        assert report.steps[path].target.endswith(f"g{spec.group_size}")
    assert states["model.norm"]["weight"].dtype == torch.float32
    assert "bias" in states["model.layers.0.self_attn.q_proj"]
    expected = logits(lmq.load(tmp_path / "q", dense=True))
    assert float((logits(model) - expected).norm() / expected.norm()) < 0.02


def test_a_layer_is_written_as_hqq_writes_it(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_small(tiny_llama, tmp_path / "q", "b3g64")
    export(checkpoint, tmp_path / "out", dtype="float16")
    config = BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
    own = HQQLinear(nn.Linear(64, 64, bias=False), config, compute_dtype=torch.float16, device="cpu")
    own.encoded_state_dict = False
    written = _states(tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    for name, value in own.state_dict().items():
        assert type(written[name]) in (type(value), torch.Tensor, nn.Parameter)
        if isinstance(value, torch.Tensor):
            assert (written[name].shape, written[name].dtype) == (value.shape, value.dtype), name
        else:
            assert written[name] == value, name
    assert written.keys() == own.state_dict().keys()
    assert _states(tmp_path / "out")["model.norm"]["weight"].dtype == torch.float16
    assert checkpoint.model_config["dtype"] == "float32"
    assert '"dtype": "float16"' in (tmp_path / "out" / "config.json").read_text()


def test_what_hqq_cannot_hold_is_said_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    checkpoint = write_small(tmp_path / "model", tmp_path / "q", "b4g256")
    cannot = r"hqq cannot pack b4g256 .* its 3 groups.*: 2 modules \(layer 0: self_attn.k_proj, self_attn.v_proj\)"
    with pytest.raises(InputError, match=cannot):
        export(checkpoint, tmp_path / "out")

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2, bias=False)
            self.gain = nn.Parameter(torch.ones(2))

    monkeypatch.setattr(hqq_export, "_skeleton", lambda checkpoint: Owner())
    assert problems(checkpoint)[-2:] == [
        "hqq opens language models whose class is named ...ForCausalLM, not Owner",
        "gain belongs to a module that holds others; hqq loads the tensors of leaf modules only",
    ]
    assert not (tmp_path / "out").exists()


def test_tensors_that_hqq_does_not_load_are_counted(tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=64, vocab_size=96, num_hidden_layers=3, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    assert problems(write_small(tmp_path / "model", tmp_path / "q", "b4g64")) == [
        "each of 6 tensors such as backbone.layers.0.mixer.A_log belongs to a module that holds others; "
        "hqq loads the tensors of leaf modules only"
    ]


def test_a_grid_that_float16_cannot_hold_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_small(tiny_llama, tmp_path / "q", "b4g64")
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.matrix_range"][1:] = torch.tensor([-1e6, 1e6])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the grid of model.layers.2.mlp.up_proj holds .*, which float16 cannot"):
        export(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "out")
    with pytest.raises(InputError, match="q exists already"):
        export(QuantizedCheckpoint(tmp_path / "q"), tmp_path / "q", dtype="float32")
