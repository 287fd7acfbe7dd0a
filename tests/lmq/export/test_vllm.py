"""vLLM's own reading of exports: which kernel it takes for every layer, and whether every tensor has its place.

Skipped without vLLM. It needs packages of other versions than lmq is tested with, so it may have an environment of its
own, whose Python LMQ_VLLM_PYTHON names. Seen with vLLM 0.33.0 without a GPU (see docs/exports.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lmq.allocation.targets import TARGETS
from lmq.checkpoint.write import write_checkpoint
from lmq.export import FORMATS
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.structure import ModuleId
from lmq.quantizers import quantizer
from tests.lmq.export.small_checkpoints import write_types

UNQUANTIZED = ModuleId(1, "self_attn.o_proj")
DENSE = ("UnquantizedLinearMethod", "", "", "", None)


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of an environment that has vLLM."""
    named = os.environ.get("LMQ_VLLM_PYTHON")
    if named is None and find_spec("vllm") is None:
        pytest.skip("vllm is not installed; LMQ_VLLM_PYTHON may name the Python of an environment that has it")
    return named or sys.executable


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are tiles of the kernels."""
    path = tmp_path_factory.mktemp("llama")
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(path)
    return path


def exported(source: Path, place: Path, target: str, *names: str) -> Path:
    """The layers in the configurations in turn, one matrix not quantized, as the target's file."""
    structure, integer_zeros = discover(source), TARGETS[target].integer_zeros
    allocation = {
        info.id: QuantSpec.parse(names[info.id.layer % len(names)])
        for info in structure.modules
        if info.id != UNQUANTIZED
    }
    write_checkpoint(place / "lmq", source, structure, allocation, quantizer("rtn", integer_zeros=integer_zeros))
    return written(QuantizedCheckpoint(place / "lmq"), place, target)


def written(checkpoint: QuantizedCheckpoint, place: Path, target: str) -> Path:
    return FORMATS[TARGETS[target].export].exporter().export(checkpoint, place / "out").path


def read_by_vllm(python: str, path: Path) -> dict[str, Any]:
    """`layers`, or the `error` with which vLLM refuses the directory."""
    out = path.with_name("read.json")
    script = Path(__file__).with_name("vllm_layers.py")
    made = subprocess.run([python, str(script), str(path), str(out)], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-3000:]
    return json.loads(out.read_text())


def layers_of(python: str, path: Path) -> dict[str, tuple[Any, ...]]:
    """Method, scheme, kernel, type and group size by layer and vLLM's matrix; every stored tensor is in its place."""
    found = read_by_vllm(python, path)
    assert "error" not in found, found["error"]
    for name, layer in found["layers"].items():
        assert not layer.get("placeless"), (name, layer)
        assert not layer.get("changed"), (name, layer)
    head = found["layers"].pop("lm_head")
    assert head["method"].startswith("Unquantized")
    fields = ("method", "scheme", "kernel", "type", "group_size")
    return {name: tuple(layer[field] for field in fields) for name, layer in found["layers"].items()}


def check(found: dict[str, tuple[Any, ...]], expected: dict[int, tuple[Any, ...]], dense: str | None) -> None:
    """Every matrix of a layer is what is expected of it, but the one that is not quantized."""
    assert len(found) == 4 * len(expected)
    for name, layer in found.items():
        assert layer == (DENSE if name == dense else expected[int(name.split(".")[2])]), name


DENSE_PATH = "model.layers.1.self_attn.o_proj"


def test_integers_of_compressed_tensors_are_read_as_planned(python: str, source: Path, tmp_path: Path) -> None:
    found = layers_of(python, exported(source, tmp_path, "vllm", "b4g64", "b8g128", "b4g32"))
    scheme = ("CompressedTensorsLinearMethod", "CompressedTensorsWNA16", "MarlinLinearKernel")
    check(found, {0: (*scheme, "uint4", 64), 1: (*scheme, "uint8b128", 128), 2: (*scheme, "uint4", 32)}, DENSE_PATH)


def test_floats_are_read_as_planned(python: str, source: Path, tmp_path: Path) -> None:
    checkpoint = write_types(source, tmp_path / "lmq", "mxfp4", "nvfp4", "fp8")
    found = layers_of(python, written(checkpoint, tmp_path, "vllm"))
    method = "CompressedTensorsLinearMethod"
    expected = {
        0: (method, "CompressedTensorsW4A4Mxfp4", "MarlinMxFp4LinearKernel", "", 32),
        1: (method, "CompressedTensorsW4A4Fp4", "MarlinNvFp4LinearKernel", "", 16),
        2: (method, "CompressedTensorsW8A16Fp8", "MarlinFP8ScaledMMLinearKernel", "", None),
    }
    check(found, expected, None)


def test_symmetric_gptq_of_4_and_8_bits_is_read_as_planned(python: str, source: Path, tmp_path: Path) -> None:
    found = layers_of(python, exported(source, tmp_path, "gptq-symmetric", "b4g64", "b8g64", "b4g128"))
    method = ("AutoGPTQLinearMethod", "", "MarlinLinearKernel")
    check(found, {0: (*method, "uint4b8", 64), 1: (*method, "uint8b128", 64), 2: (*method, "uint4b8", 128)}, DENSE_PATH)


@pytest.mark.parametrize(
    ("target", "names"), [("gptq", ["b4g64"]), ("gptq-symmetric", ["b4g64", "b3g64"]), ("auto-round", ["b4g64"])]
)
def test_what_vllm_does_not_read_is_refused_by_it(
    target: str, names: list[str], python: str, source: Path, tmp_path: Path
) -> None:
    """As `lmq export` and docs/exports.md say."""
    error = read_by_vllm(python, exported(source, tmp_path, target, *names))["error"]
    assert "Unsupported packing_format" in error if target == "auto-round" else "Unsupported quantization conf" in error


def test_awq_is_read_as_planned(python: str, source: Path, tmp_path: Path) -> None:
    found = layers_of(python, exported(source, tmp_path, "awq", "b4g64"))
    expected = ("AutoAWQMarlinLinearMethod", "", "MarlinLinearKernel", "uint4", 64)
    check(found, dict.fromkeys(range(3), expected), DENSE_PATH)
