"""`lmq verify`: sizes of a whole checkpoint, damages of a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmq_flows.cli import main
from tests.lmq.export.small_checkpoints import write_small


def test_sizes_then_damage(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_small(tiny_llama, tmp_path / "q", "b4g64", "b3g32").path
    assert main(["verify", str(path)]) == 0
    printed = capsys.readouterr().out
    total_bytes = sum(file.stat().st_size for file in path.iterdir())
    for words in ("28 quantized matrices", "headers of the weight files", f"{total_bytes:,}", "as they were written"):
        assert words in printed

    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(path)]) == 1
    printed = capsys.readouterr().out
    assert f"{weights}: " in printed
    assert "1 damaged" in printed
    weights.write_bytes(content[:-1])
    assert main(["verify", str(path)]) == 2
    assert "model.safetensors is truncated or damaged" in capsys.readouterr().err

    (path / "checksums.json").unlink()
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(path)]) == 0
    assert "contents were not checked" in capsys.readouterr().out
