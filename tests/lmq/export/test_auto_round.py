from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lmq
from lmq.export.auto_round import export, problems
from lmq.model.structure import ModuleId
from lmq.model.tensors import read_headers
from tests.lmq.export.other_programs import TRANSFORMERS, opened_by
from tests.lmq.export.small_checkpoints import TOKENS, logits
from tests.lmq.export.test_gptq import by_layer, check_opened, config_of, relative

MIXED = ("b4g64", "b5g32", "b6g64", "b3g32")


def test_what_differs_from_most_is_named_by_its_path(tiny_qwen: Path, tmp_path: Path) -> None:
    choice = {ModuleId(1, "self_attn.o_proj"): "", ModuleId(3, "mlp.up_proj"): "b2g32"}
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", "b4g64", choice=choice)
    assert problems(checkpoint) == []
    export(checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out") == {
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "data_type": "int",
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.1.self_attn.o_proj": {"bits": 16},
            "model.layers.3.mlp.up_proj": {"bits": 2, "group_size": 32},
        },
    }


@pytest.mark.parametrize(("specs", "layout"), [(MIXED, "auto_round"), (("b8g64",), "auto_round:auto_gptq")])
def test_the_codes_are_kept(specs: tuple[str, ...], layout: str, tiny_qwen: Path, tmp_path: Path) -> None:
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", *specs)
    report = export(checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out")["packing_format"] == layout
    names = read_headers(tmp_path / "out")
    assert {f"{path}.qweight" for path in report.steps} <= set(names)
    assert not [name for name in names if name.endswith("g_idx")]
    opened = lmq.load(tmp_path / "out", dtype=torch.float32)
    for path, step in report.steps.items():
        assert step.relative_error < 2**-11
        assert relative(opened.get_submodule(path).weight, checkpoint.weight(path)) == pytest.approx(
            step.relative_error, rel=1e-3
        )
    assert relative(logits(opened), logits(lmq.load(tmp_path / "lmq", dtype=torch.float32))) < 5e-3


@pytest.mark.parametrize("zeros", [True, "middle"], ids=["whole", "symmetric"])
@pytest.mark.parametrize("specs", [("b2g32",), MIXED], ids=["2 bits", "mix"])
def test_auto_round_opens_an_export(specs: tuple[str, ...], zeros: bool | str, tiny_qwen: Path, tmp_path: Path) -> None:
    choice = {ModuleId(1, "self_attn.o_proj"): ""}
    checkpoint = by_layer(tiny_qwen, tmp_path / "lmq", *specs, integer_zeros=zeros, choice=choice)
    export(checkpoint, tmp_path / "out")
    check_opened(checkpoint, *opened_by(TRANSFORMERS, "auto_round", tmp_path / "out", TOKENS, tmp_path))
