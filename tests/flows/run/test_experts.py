"""A whole run of a mixture of experts, one of which no token is routed to."""

from __future__ import annotations

import csv
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lmq
from lmq.checkpoint.verify import quantized_bytes
from lmq.errors import LmqError
from lmq.formats.spec import QuantSpec
from lmq.report.results import read_results
from lmq_flows.graph.build import build_graph
from lmq_flows.run.plan import ready_models
from lmq_tasks.allocate import write_configurations
from lmq_tasks.quantization import checkpoint
from tests.flows.conftest import run_and_look, tiny_config
from tests.mixtures import mixture


@pytest.fixture(scope="module")
def finished(server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("experts")
    source = mixture("gpt-oss")
    with torch.no_grad():
        source.get_submodule("model.layers.0.mlp.router").bias[3] = -1000.0
    model = shutil.copytree(tiny_llama, place / "model")  # its tokenizer
    source.save_pretrained(model)
    config = tiny_config(
        model,
        place,
        strategies=["uniform", "mxq", "loss-aware", "auto"],
        measure={"quantizer": "fisher-gptq", "menu": ["b2g64", "b3g64", "b4g64", "b8g64"]},
        constraints={"alike": ["experts"]},
        calibration={"sequences": 8, "sequence_length": 64},
    )
    return config, run_and_look(config)


def test_every_strategy_makes_checkpoints_of_the_bytes_it_counted(finished) -> None:
    config, done = finished
    assert done.state.is_completed()
    results = read_results(config.run_dir / "results.json")
    assert [result.error for result in results] == [None] * 5
    for result in results[1:]:
        assert quantized_bytes(config.run_dir / result.checkpoint) == result.size_bytes <= result.budget_bytes
    model = lmq.load(config.run_dir / results[-1].checkpoint)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_experts_that_no_token_reached_are_named(finished) -> None:
    config, done = finished
    assert "expert-tokens" in done.ran()
    named = "layer 0 mlp.experts.3 (0)"
    (warning,) = (config.run_dir / "warnings.txt").read_text().splitlines()
    assert "experts saw fewer than 64 calibration tokens" in warning
    report = (config.run_dir / "report.html").read_text()
    result = read_results(config.run_dir / "results.json")[1]
    card = (config.run_dir / result.checkpoint / "README.md").read_text()
    assert all(named in text for text in (warning, report, card))
    assert "| mlp.experts.*.down_proj |" in card
    assert "router mlp.router.weight [4, 64] of layers 0-1" in card


def test_experts_are_alike_where_that_is_asked(finished) -> None:
    config, _ = finished
    with (config.run_dir / "allocation-tiny-loss-aware-uniform-b4g64.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    taken = defaultdict(set)
    for row in rows:
        if ".experts." in row["kind"]:
            taken[row["layer"], row["kind"].rsplit(".", 1)[1]].add((row["bits"], row["group_size"]))
    assert len(taken) == 4
    assert all(len(specs) == 1 for specs in taken.values())
    assert len({(row["bits"], row["group_size"]) for row in rows}) > 1


def test_dense_models_count_no_tokens_of_experts(tiny_llama: Path, tmp_path: Path) -> None:
    models, texts = ready_models(tiny_config(tiny_llama, tmp_path))
    graph, _, _ = build_graph(tiny_config(tiny_llama, tmp_path), models, texts)
    assert "expert-tokens" not in {node.stage.name for node in graph}


@pytest.mark.parametrize("quantizer", ["gptq", "fisher-gptq"])
def test_codes_of_experts_are_chosen_on_all_tokens_where_that_is_asked(
    finished, tiny_llama: Path, tmp_path: Path, quantizer: str
) -> None:
    mixed = Path(finished[0].models[0].source)
    keys = {}
    for model, tokens in ((mixed, "routed"), (mixed, "all"), (tiny_llama, "routed"), (tiny_llama, "all")):
        config = tiny_config(model, tmp_path, measure={"quantizer": quantizer, "expert_tokens": tokens})
        nodes = build_graph(config, *ready_models(config))[0]
        of_moments = [node for node in nodes if node.stage.name in ("second-moments", "sampled-backward")]
        keys[model, tokens] = {node.stage.name: node.config.get("expert_tokens") for node in of_moments}
    assert set(keys[mixed, "all"].values()) == {"all"}
    without = [keys[mixed, "routed"], keys[tiny_llama, "routed"], keys[tiny_llama, "all"]]
    assert all(set(found.values()) == {None} for found in without)


def test_a_plan_that_leaves_out_an_expert_makes_no_checkpoint(finished, tmp_path: Path) -> None:
    config, _ = finished
    structure = ready_models(config)[0][0].structure
    chosen = {info.id: QuantSpec(4, 64) for info in structure.modules if info.id.kind != "mlp.experts.2.down_proj"}
    write_configurations(tmp_path / "plan.json", chosen)
    job = SimpleNamespace(output=tmp_path, input=lambda *_: tmp_path / "plan.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmq_tasks.quantization.read_structure", lambda _: structure)
        with pytest.raises(LmqError, match=r"leaves out layer 0 mlp\.experts\.2\.down_proj and 1 more of 24"):
            checkpoint.body(job)
    assert not (tmp_path / "checkpoint").exists()
