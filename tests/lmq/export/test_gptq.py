from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lmq
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import DamagedFile, InputError
from lmq.export.gptq import export, problems
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.structure import ModuleId
from lmq.model.tensors import read_headers, read_tensors
from lmq.quantizers import quantizer
from tests.lmq.export.other_programs import GPTQMODEL, TRANSFORMERS, opened_by
from tests.lmq.export.small_checkpoints import TOKENS, logits

FLOAT16_ROUNDING = 2**-11


def by_layer(
    source: Path, path: Path, *specs: str, integer_zeros: bool | str = True, choice: dict[ModuleId, str] | None = None
) -> QuantizedCheckpoint:
    """Every layer in the next of the configurations; modules of `choice` in theirs, and as they are where it is ""."""
    structure = discover(source)
    names = {info.id: specs[info.id.layer % len(specs)] for info in structure.modules} | (choice or {})
    chosen = {module: QuantSpec.parse(name) for module, name in names.items() if name}
    write_checkpoint(path, source, structure, chosen, quantizer("hqq", integer_zeros=integer_zeros))
    return QuantizedCheckpoint(path)


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@torch.no_grad()
def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_opened(checkpoint: QuantizedCheckpoint, found: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
    """What another program computes in float16 is what the checkpoint does."""
    assert weights.keys() == checkpoint.specs.keys()
    for path, weight in weights.items():
        assert relative(weight, checkpoint.weight(path)) < 2 * FLOAT16_ROUNDING
    assert relative(found, logits(lmq.load(checkpoint.path, dtype=torch.float32))) < 1e-2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_codes_are_kept(bits: int, tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", f"b{bits}g32", f"b{bits}g64")
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out")
    assert report.steps.keys() == checkpoint.specs.keys()
    assert max(step.relative_error for step in report.steps.values()) < FLOAT16_ROUNDING
    tensors = read_tensors(read_headers(tmp_path / "out").values())
    for path, spec in checkpoint.specs.items():
        rows, columns = checkpoint.shapes[path]
        groups = columns // spec.group_size
        assert tensors[f"{path}.qweight"].shape == (columns * bits // 32, rows)
        assert tensors[f"{path}.qzeros"].shape == (groups, rows * bits // 32)
        assert tensors[f"{path}.scales"].shape == (groups, rows)
        assert tensors[f"{path}.scales"].dtype == torch.float16
        assert tensors[f"{path}.g_idx"].tolist() == [column // spec.group_size for column in range(columns)]
    for name, stored in checkpoint.unquantized.items():
        assert torch.equal(tensors[name], read_tensors([stored])[name])
    opened = lmq.load(tmp_path / "out")
    for path in checkpoint.specs:
        weight = opened.get_submodule(path).weight
        assert relative(weight, checkpoint.weight(path)) == pytest.approx(report.steps[path].relative_error, abs=1e-6)


def test_symmetric_zeros_are_less_1_and_others_are_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    for bits, layout, symmetric in ((8, "gptq", True), (4, "gptq_v2", False)):
        checkpoint = by_layer(tiny_llama, tmp_path / f"{bits}", f"b{bits}g64")
        export(checkpoint, tmp_path / f"{bits}-gptq")
        config = config_of(tmp_path / f"{bits}-gptq")
        assert (config["checkpoint_format"], config["format"], config["sym"]) == (layout, layout, symmetric)
        assert config == json.loads((tmp_path / f"{bits}-gptq" / "quantize_config.json").read_text())
    tensors = read_tensors(read_headers(tmp_path / "8-gptq").values())
    zeros = {name: tensor for name, tensor in tensors.items() if name.endswith("qzeros")}
    assert {int(word) for tensor in zeros.values() for word in tensor.unique()} == {0x7F7F7F7F}


def _rule(config: dict, path: str) -> str | None:
    """The pattern of `dynamic` that vLLM and GPTQModel find for a module: the first that matches from its beginning."""
    found = [rule for rule in config["dynamic"] if re.match(rule[2:], path)]
    assert len(found) <= 1
    return found[0] if found else None


def test_rules_name_what_differs_from_most(tiny_qwen: Path, tmp_path: Path) -> None:
    choice = {ModuleId(2, "mlp.down_proj"): "b2g32", ModuleId(1, "self_attn.o_proj"): ""}
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", "b4g64", "b3g32", "b4g64", "b4g64", choice=choice)
    report = export(checkpoint, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["bits"], config["group_size"]) == (4, 64)
    for path, spec in checkpoint.specs.items():
        rule = _rule(config, path)
        own = {"bits": 4, "group_size": 64} | (config["dynamic"][rule] if rule else {})
        assert own == {"bits": spec.bits, "group_size": spec.group_size}
        assert rule is None or rule.startswith("+:")
    assert _rule(config, "model.layers.1.self_attn.o_proj").startswith("-:")
    # vLLM asks for the matrices that it fuses by its own names
    for fused in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert config["dynamic"][_rule(config, f"model.layers.1.{fused}")] == {"bits": 3, "group_size": 32}
        assert _rule(config, f"model.layers.2.{fused}") is None
    assert _rule(config, "model.layers.11.mlp.up_proj") is None
    assert any(
        "transformers does not; for transformers export with --format auto-round" in note for note in report.notes
    )


@pytest.mark.parametrize(
    ("spec", "integer_zeros", "opens"), [("b4g64", "middle", True), ("b3g64", "middle", False), ("b4g64", True, False)]
)
def test_what_vllm_does_not_open_is_said(
    spec: str, integer_zeros: bool | str, opens: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """As vLLM itself does in test_vllm."""
    report = export(by_layer(tiny_llama, tmp_path / "lmq", spec, integer_zeros=integer_zeros), tmp_path / "out")
    assert any("vLLM does not open this" in note for note in report.notes) is not opens


def test_kinds_that_vllm_fuses_and_that_differ_are_said(tiny_llama: Path, tmp_path: Path) -> None:
    choice = {ModuleId(layer, "self_attn.q_proj"): "b8g64" for layer in (0, 3)}
    report = export(by_layer(tiny_llama, tmp_path / "lmq", "b4g64", choice=choice), tmp_path / "out")
    assert any("k_proj, q_proj, v_proj differ in 2 blocks, so vLLM and SGLang" in note for note in report.notes)


def test_what_the_kernels_cannot_hold_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_llama, tmp_path / "lmq", "b5g64", "b4g16", "b4g128", "b4g64")
    assert [problem.partition(":")[0] for problem in problems(checkpoint)] == [
        "5-bit codes, where gptq takes 2 or 3 or 4 or 8 bits",
        "groups of 16, where gptq takes groups of 32 or 64 or 128",
        "groups of 128 that straddle rows of 64 weights",
    ]
    with pytest.raises(InputError, match=r"cannot be written for gptq: 5-bit codes.*lmq run --target gptq"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_zeros_are_moved_and_the_error_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_llama, tmp_path / "lmq", "b4g64", integer_zeros=False)
    report = export(checkpoint, tmp_path / "out")
    opened = lmq.load(tmp_path / "out", dtype=torch.float32)
    for path, step in report.steps.items():
        error = relative(opened.get_submodule(path).weight, checkpoint.weight(path))
        assert step.relative_error == pytest.approx(error, rel=1e-3)
        assert 1e-3 < error < 0.1
    assert any("zeros were moved to whole numbers in 28 modules" in note for note in report.notes)


def test_a_layout_that_is_not_read_and_files_without_codes_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    export(by_layer(tiny_llama, tmp_path / "lmq", "b4g64"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the GPTQ layout 'marlin', which lmq does not read; it reads gptq, gptq_v2"):
        lmq.load(tmp_path / "out")
    with pytest.raises(InputError, match="has no checksums; leave out verify"):
        lmq.load(tmp_path / "out", verify=True)
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (tiny := tmp_path / "dense").mkdir()
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    with pytest.raises(DamagedFile, match="holds no qweight, though"):
        lmq.load(tiny)


@pytest.mark.parametrize("zeros", [True, "middle"], ids=["whole", "symmetric"])
@pytest.mark.parametrize("specs", [("b3g32",), ("b4g64", "b2g32", "b3g32", "b8g64")], ids=["3 bits", "mix"])
def test_gptqmodel_opens_an_export(specs: tuple[str, ...], zeros: bool | str, tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", *specs, integer_zeros=zeros)
    export(checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out")["format"] == ("gptq" if zeros == "middle" else "gptq_v2")
    check_opened(checkpoint, *opened_by(GPTQMODEL % "GPTQ_TORCH", "gptqmodel", tmp_path / "out", TOKENS, tmp_path))


@pytest.mark.skipif(find_spec("optimum") is None, reason="optimum is not installed")
def test_transformers_opens_an_export_of_one_configuration(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_llama, tmp_path / "lmq", "b4g64")
    export(checkpoint, tmp_path / "out")
    check_opened(checkpoint, *opened_by(TRANSFORMERS, "gptqmodel", tmp_path / "out", TOKENS, tmp_path))
