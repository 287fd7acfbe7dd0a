"""The bytes that plans for a target count are those of the matrices in its file (types: test_compressed_tensors)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq.allocation.targets import TARGETS
from lmq.checkpoint.write import write_checkpoint
from lmq.export import FORMATS
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.tensors import read_headers, size_bytes
from lmq.quantizers import quantizer

INTEGER_TARGETS = sorted(name for name, target in TARGETS.items() if target.integer_zeros)


@pytest.mark.parametrize("name", INTEGER_TARGETS)
def test_counted_bytes_are_those_of_the_file(name: str, tiny_qwen: Path, tmp_path: Path) -> None:
    target, structure = TARGETS[name], discover(tiny_qwen)
    ids = [info.id for info in structure.modules]
    codes = quantizer("rtn", integer_zeros=target.integer_zeros)
    for spec in (spec for spec in target.specs if spec.gguf is None and spec.group_size < 128):
        write_checkpoint(tmp_path / f"lmq-{spec}", tiny_qwen, structure, dict.fromkeys(ids, spec), codes)
        checkpoint = QuantizedCheckpoint(tmp_path / f"lmq-{spec}")
        FORMATS[target.export].exporter().export(checkpoint, tmp_path / f"out-{spec}")
        stored = read_headers(tmp_path / f"out-{spec}")
        for path, shape in checkpoint.shapes.items():
            there = sum(size_bytes(tensor) for tensor_name, tensor in stored.items() if is_of(tensor_name, path))
            assert there == target.size_bytes(spec, *shape), (path, spec)


def is_of(tensor_name: str, path: str) -> bool:
    return tensor_name.rpartition(".")[0] == path and not tensor_name.endswith(".bias")


def test_types_of_gguf_take_the_same_bytes_everywhere() -> None:
    for spec in TARGETS["llama.cpp"].specs:
        assert TARGETS["llama.cpp"].size_bytes(spec, 8, 512) == spec.size_bytes(8 * 512, 512)
    assert TARGETS["gptq"].size_bytes(QuantSpec(4, 64), 32, 64) == 32 * 64 // 2 + 32 * 2 + 32 // 2 + 4 * 64
