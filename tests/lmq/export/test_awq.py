from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lmq
from lmq.errors import InputError
from lmq.export.awq import export, problems
from lmq.model.structure import ModuleId
from tests.lmq.export.other_programs import GPTQMODEL, TRANSFORMERS, opened_by
from tests.lmq.export.small_checkpoints import TOKENS, logits
from tests.lmq.export.test_gptq import by_layer, check_opened, config_of, relative


def test_the_codes_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_model, tmp_path / "lmq", "b4g32", choice={ModuleId(1, "self_attn.o_proj"): ""})
    assert problems(checkpoint) == []
    report = export(checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out") == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj"],
    }
    opened = lmq.load(tmp_path / "out", dtype=torch.float32)
    for path, step in report.steps.items():
        assert step.relative_error < 2**-11
        assert relative(opened.get_submodule(path).weight, checkpoint.weight(path)) == pytest.approx(
            step.relative_error, rel=1e-3
        )
    assert relative(logits(opened), logits(lmq.load(tmp_path / "lmq", dtype=torch.float32))) < 5e-3


def test_other_bits_and_two_group_sizes_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written for awq: 3-bit codes, where awq takes 4 bits: 7 modules"):
        export(by_layer(tiny_llama, tmp_path / "3", "b4g64", "b4g64", "b3g64", "b4g64"), tmp_path / "out")
    found = problems(by_layer(tiny_llama, tmp_path / "2", "b4g64", "b4g64", "b4g32", "b4g64"))
    assert len(found) == 1
    assert found[0].startswith("AWQ holds one group size, and most weights are b4g64: 7 modules (layer 2: ")


@pytest.mark.parametrize("opener", [GPTQMODEL % "AWQ_TORCH", TRANSFORMERS], ids=["gptqmodel", "transformers"])
@pytest.mark.skipif(find_spec("optimum") is None, reason="optimum is not installed")
def test_gptqmodel_and_transformers_open_an_export(opener: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_llama, tmp_path / "lmq", "b4g64")
    export(checkpoint, tmp_path / "out")
    check_opened(checkpoint, *opened_by(opener, "gptqmodel", tmp_path / "out", TOKENS, tmp_path))
