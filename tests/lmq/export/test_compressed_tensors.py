from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import lmq
from lmq.allocation.targets import TARGETS
from lmq.checkpoint.open import open_dense
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError
from lmq.export.compressed_tensors import export, problems, quantization_config
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.integer_words import pack_words
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.structure import ModuleId
from lmq.model.tensors import read_headers, read_tensors
from lmq.quantizers import quantizer
from tests.lmq.export.small_checkpoints import write_types

FLOAT16_ROUNDING = 2**-11


def _checkpoint(
    source: Path, path: Path, *specs: str, integer_zeros: bool = True, choice: dict[ModuleId, str] | None = None
) -> QuantizedCheckpoint:
    """Every layer in the next of the configurations; modules of `choice` in theirs, and as they are where it is ""."""
    structure = discover(source)
    names = {info.id: specs[info.id.layer % len(specs)] for info in structure.modules} | (choice or {})
    write_checkpoint(
        path,
        source,
        structure,
        {module: QuantSpec.parse(name) for module, name in names.items() if name},
        quantizer("hqq", integer_zeros=integer_zeros),
    )
    return QuantizedCheckpoint(path)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(read_headers(path).values())


def _weight(tensors: dict[str, torch.Tensor], path: str, bits: int) -> torch.Tensor:
    """The weight as the layout says, float64, unpacked by the package."""
    shape = torch.Size(tensors[f"{path}.weight_shape"].tolist())
    scale = tensors[f"{path}.weight_scale"].double()
    codes = unpack_from_int32(tensors[f"{path}.weight_packed"], bits, shape).double()
    zero = torch.zeros_like(scale)  # codes come without their middle
    if f"{path}.weight_zero_point" in tensors:
        zero = unpack_from_int32(tensors[f"{path}.weight_zero_point"], bits, scale.shape, packed_dim=0).double()
    group_size = shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(group_size, 1)) * scale.repeat_interleave(group_size, 1)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(2, 34)[None]).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_the_package_packs_them(bits: int) -> None:
    codes = torch.randint(2**bits, (24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    centred = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(centred, bits))
    assert torch.equal(pack_words(codes.t(), bits).t(), pack_to_int32(centred, bits, packed_dim=0))


def test_grids_with_whole_zeros_are_exact_up_to_the_scales(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_model, tmp_path / "lmq", "b4g32", "b8g32", "b4g64", "b8g64")
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out")
    tensors = _tensors(report.path)
    assert report.steps.keys() == checkpoint.specs.keys()
    assert report.size_bytes == sum(file.stat().st_size for file in report.path.iterdir())
    for path, spec in checkpoint.specs.items():
        step = report.steps[path]
        assert step.target == f"W{spec.bits}A16 g{spec.group_size}"
        assert step.relative_error < FLOAT16_ROUNDING
        expected = checkpoint.weight(path).double()
        error = (_weight(tensors, path, spec.bits) - expected).norm() / expected.norm()
        assert step.relative_error == pytest.approx(float(error), rel=1e-3)
        shape = tensors[f"{path}.weight_scale"].shape
        assert tensors[f"{path}.weight_scale"].dtype == torch.float16
        if spec.bits == 4:
            assert tensors[f"{path}.weight_zero_point"].shape == (shape[0] // 8, shape[1])
        else:
            assert f"{path}.weight_zero_point" not in tensors
    for name, stored in checkpoint.unquantized.items():
        assert torch.equal(tensors[name], read_tensors([stored])[name])


def test_the_package_and_transformers_read_the_configuration(tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_qwen, tmp_path / "lmq", "b4g32", "b8g64")
    export(checkpoint, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(fields)
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"
    assert {"lm_head", "model.embed_tokens"} == set(config.ignore)
    found = {}
    for scheme in config.config_groups.values():
        for target in scheme.targets:
            found[target] = (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric)
    expected = {path: (spec.bits, spec.group_size, spec.bits == 8) for path, spec in checkpoint.specs.items()}
    assert found == expected
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_mixed_export_gives_the_logits_of_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_model, tmp_path / "lmq", "b4g32", "b8g64", "b4g64")
    export(checkpoint, tmp_path / "out")
    tensors = _tensors(tmp_path / "out")
    dense = lmq.load(tmp_path / "lmq", dtype=torch.float32)
    expected = _logits(dense)
    for path, spec in checkpoint.specs.items():
        linear = dense.get_submodule(path).to_linear(torch.float32)
        linear.weight = torch.nn.Parameter(_weight(tensors, path, spec.bits).float())
        dense.set_submodule(path, linear)
    logits = _logits(open_dense(tmp_path / "out"))
    assert torch.allclose(logits, _logits(dense), atol=1e-5)
    assert (logits - expected).norm() / expected.norm() < 0.01


def test_floats_are_exported_as_they_are_and_open_as_the_checkpoint(tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = write_types(tiny_qwen, tmp_path / "lmq", "mxfp4", "nvfp4", "b4g32", "fp8")
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out")
    tensors = _tensors(report.path)
    for path, spec in checkpoint.specs.items():
        step = report.steps[path]
        if spec.gguf is not None:
            assert (step.target, step.relative_error) == (f"{spec.name.upper()}A16", 0.0)
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"{path}.weight")]
        assert sum(tensor.nbytes for tensor in own) == TARGETS["vllm"].size_bytes(spec, *checkpoint.shapes[path])
    opened = open_dense(report.path)
    for path, spec in checkpoint.specs.items():
        if spec.gguf is not None:
            assert torch.equal(opened.get_submodule(path).get_parameter("weight"), checkpoint.weight(path))
    own_logits = _logits(lmq.load(checkpoint.path, dtype=torch.float32, dense=True))
    assert (_logits(opened) - own_logits).norm() / own_logits.norm() < FLOAT16_ROUNDING
    with torch.no_grad():
        assert torch.equal(_logits(lmq.load(report.path, dtype=torch.float32)), _logits(opened))
    (note,) = (note for note in report.notes if "mxfp4" in note)
    assert "--dtype bfloat16" in note


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*_proj$"]])
def test_floats_of_modules_that_are_not_named_are_opened(targets: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    """llm-compressor names the class of a module, or a pattern."""
    checkpoint = write_types(tiny_llama, tmp_path / "lmq", "nvfp4")
    export(checkpoint, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    fields["quantization_config"]["config_groups"]["nvfp4"]["targets"] = targets
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields))
    opened: Any = lmq.load(tmp_path / "out")
    for path in checkpoint.specs:
        assert torch.equal(opened.get_submodule(path).get_parameter("weight"), checkpoint.weight(path))


def test_floats_that_are_fused_share_their_scale(tiny_llama: Path, tmp_path: Path) -> None:
    report = export(write_types(tiny_llama, tmp_path / "lmq", "nvfp4"), tmp_path / "out")
    tensors = _tensors(report.path)
    for joined in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        scales = [tensors[f"model.layers.0.{joined[0]}.{name}.weight_global_scale"] for name in joined[1]]
        assert len({float(scale) for scale in scales}) == 1
    assert {float(tensor).hex()[:5] for name, tensor in tensors.items() if "global" in name} == {"0x1.0"}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_configuration_of_floats_is_the_packages_own(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_types(tiny_llama, tmp_path / "lmq", name)
    ours = quantization_config(checkpoint)
    scheme = preset_name_to_scheme(f"{name.upper()}A16", list(checkpoint.specs))
    scheme.format = f"{name}-pack-quantized"
    theirs = QuantizationConfig(
        config_groups={name: scheme}, ignore=ours["ignore"], format=scheme.format, quantization_status="compressed"
    ).to_dict()
    assert ours == {key: theirs[key] for key in ours}
    assert not any(theirs[key] for key in theirs.keys() - ours.keys())


def test_floats_of_8_bits_are_described_and_opened_as_the_packages_own(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = write_types(tiny_llama, tmp_path / "lmq", "fp8")
    report = export(checkpoint, tmp_path / "out")
    ours = quantization_config(checkpoint)
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
    scheme = QuantizationScheme(targets=list(checkpoint.specs), weights=args, format="naive-quantized")
    theirs = QuantizationConfig(
        config_groups={"fp8": scheme}, ignore=ours["ignore"], format=scheme.format, quantization_status="compressed"
    ).to_dict()
    assert ours == {key: theirs[key] for key in ours}
    opened = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32)
    own = lmq.load(checkpoint.path, dtype=torch.float32, dense=True)
    assert torch.equal(_logits(opened), _logits(own))
    assert torch.equal(_logits(lmq.load(report.path, dtype=torch.float32)), _logits(own))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(("spec", "options"), [("b8g64", None), ("b4g64", CompressedTensorsConfig(dequantize=True))])
def test_transformers_opens_an_export(
    spec: str, options: CompressedTensorsConfig | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """8 bits as they are; zeros of 4 bits only with `dequantize`, see `lmq.checkpoint.open`."""
    export(_checkpoint(tiny_llama, tmp_path / "lmq", spec), tmp_path / "out")
    opened = {} if options is None else {"quantization_config": options}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **opened)
    expected = _logits(open_dense(tmp_path / "out"))
    assert (_logits(model) - expected).norm() / expected.norm() < 1e-2  # computes the weights in float16


def test_real_zeros_are_moved_and_the_error_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_llama, tmp_path / "lmq", "b4g64", "b8g64", integer_zeros=False)
    report = export(checkpoint, tmp_path / "out")
    tensors = _tensors(tmp_path / "out")
    for path, spec in checkpoint.specs.items():
        expected = checkpoint.weight(path).double()
        error = float((_weight(tensors, path, spec.bits) - expected).norm() / expected.norm())
        assert report.steps[path].relative_error == pytest.approx(error, rel=1e-3)
        assert error < (0.1 if spec.bits == 4 else 0.01)
    assert any("zeros were moved to whole numbers in 28 modules" in note for note in report.notes)
    assert any("lmq run --target vllm" in note for note in report.notes)


def test_scales_have_the_type_of_a_bfloat16_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    report = export(_checkpoint(tmp_path / "source", tmp_path / "lmq", "b4g32"), tmp_path / "out")
    scales = [tensor for name, tensor in _tensors(tmp_path / "out").items() if name.endswith("weight_scale")]
    assert {scale.dtype for scale in scales} == {torch.bfloat16}
    assert max(step.relative_error for step in report.steps.values()) < 2**-8


def test_what_the_kernels_cannot_hold_is_counted_and_refused(tiny_llama: Path, tmp_path: Path) -> None:
    kinds = {
        "q": ModuleId(1, "self_attn.q_proj"),
        "k": ModuleId(1, "self_attn.k_proj"),
        "up": ModuleId(2, "mlp.up_proj"),
    }
    choice = {kinds["q"]: "b8g64", kinds["k"]: "", kinds["up"]: "b4g16"}
    checkpoint = _checkpoint(tiny_llama, tmp_path / "lmq", "b3g64", "b4g64", "b4g64", "b4g128", choice=choice)
    found = problems(checkpoint)
    assert found == [
        "3-bit codes, where vllm takes 4 or 8 bits: 7 modules (layer 0: mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj)",
        "groups of 16, where vllm takes groups of 32 or 64 or 128: 1 module (layer 2: mlp.up_proj)",
        "groups of 128 that straddle rows of 64 weights: 6 modules (layer 3: mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj)",
        "k_proj, q_proj, v_proj differ, which vllm holds in one matrix: 1 module (layer 1: self_attn)",
        "gate_proj, up_proj differ, which vllm holds in one matrix: 1 module (layer 2: mlp)",
    ]
    with pytest.raises(InputError, match=r"cannot be written for vllm: 3-bit codes.*lmq run --target vllm"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_along_out_features_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    structure = discover(tiny_llama)
    choice = dict.fromkeys((info.id for info in structure.modules), QuantSpec(4, 64))
    write_checkpoint(tmp_path / "lmq", tiny_llama, structure, choice, quantizer("rtn", axis=0))
    assert problems(QuantizedCheckpoint(tmp_path / "lmq")) == [
        "groups run along out_features (axis 0), where vllm takes axis 1"
    ]


def test_an_export_replaces_nothing_and_another_directory_is_no_export(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_llama, tmp_path / "lmq", "b4g64")
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, tmp_path)
    with pytest.raises(InputError, match=r"is not a checkpoint of gptq, .*compressed-tensors"):
        open_dense(tiny_llama)
