"""Memory and speed in a process of their own; figures are only compared with what they must exceed."""

import shutil
import sys
from pathlib import Path

import pytest

from lmq.errors import LmqError
from lmq.evaluation.performance import measure_performance
from lmq.model.discovery import discover


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process this way")
@pytest.mark.filterwarnings("ignore")
def test_memory_holds_the_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    structure = discover(tmp_path / "model", weights_sha256="0")
    weights = 4 * structure.parameters + structure.other_bytes
    found = measure_performance(tmp_path / "model", prompt_tokens=16, generated_tokens=4)
    assert found.memory_resident_bytes is not None
    assert weights <= found.memory_resident_bytes < 1.5 * weights
    assert found.peak_generation_bytes is not None
    assert found.peak_generation_bytes >= found.memory_resident_bytes
    assert found.prompt_tokens_per_second > 0
    assert found.generation_tokens_per_second > 0
    assert "1 thread of" in found.host
    assert "float32" in found.host


def test_what_does_not_open_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LmqError, match=r"measures memory and speed of .*model failed: .*does not open"):
        measure_performance(tmp_path / "model")
