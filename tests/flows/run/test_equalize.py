"""A run of a model whose channels are rescaled first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmq
from lmq.model.discovery import discover
from lmq_flows.run.expectation import expect, planned_nodes
from lmq_flows.run.plan import plan_run
from tests.channels import scale_channels_apart
from tests.flows.conftest import promised, run_and_look, tiny_config

pytestmark = pytest.mark.slow


def test_checkpoints_of_an_equalized_model_compute_what_its_source_does(
    server, tiny_qwen: Path, tmp_path: Path
) -> None:
    source = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    scale_channels_apart(source)
    path = tmp_path / "apart"
    source.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_qwen).save_pretrained(path)
    config = tiny_config(
        path,
        tmp_path,
        models=[{"name": "tiny", "source": str(path), "equalize": True}],
        strategies=["uniform"],
        budgets=["uniform b8g64"],
        measure={"quantizer": "fisher-gptq", "menu": ["b4g64", "b8g64"]},
    )
    assert plan_run(config).to_convert == ["tiny"]
    before = expect(config, discover(path), planned_nodes(config))
    assert before.nodes > 20
    assert before.cached == 0
    done = run_and_look(config)
    assert done.state.is_completed()
    assert "equalize" in done.ran()
    (checkpoint,) = (config.run_dir / "checkpoints").glob("*uniform*")
    ours = lmq.load(checkpoint)
    tokens = torch.randint(2, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source(tokens).logits, ours(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.allclose(ours.state_dict()[norm], source.state_dict()[norm], rtol=0.01)
    assert all(promised(config).values())
