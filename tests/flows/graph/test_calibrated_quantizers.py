"""A whole run whose quantizer looks at the calibration text, without Prefect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lmq
from lmq.errors import InputError
from lmq.formats.coded_grid import CodedGrid
from lmq.measurement.grids import load_grids
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.node import Graph, Node
from lmq_flows.run.plan import execute_directly, ready_models
from lmq_storage import ArtifactStore
from lmq_tasks.allocate import ALLOCATION_FILE, read_configurations
from tests.flows.conftest import tiny_config


def _config(model: Path, place: Path, quantizer: str) -> RunConfig:
    plans = {"strategies": ["uniform", "loss-aware"], "measure__menu": ["b3g64", "b4g64", "b5g64"]}
    return tiny_config(model, place, measure__quantizer=quantizer, **plans)


def _graph(config: RunConfig) -> tuple[Graph, list[Node]]:
    models, texts = ready_models(config)
    graph, variants, _ = build_graph(config, models, texts)
    return graph, [variant.checkpoint for variant in variants if variant.checkpoint is not None]


@pytest.mark.slow
def test_what_is_stored_are_the_codes_that_were_measured(tiny_qwen: Path, tmp_path: Path) -> None:
    config = _config(tiny_qwen, tmp_path, "fisher-gptq")
    graph, checkpoints = _graph(config)
    refs = execute_directly(graph, checkpoints)
    store = ArtifactStore(config.store)
    stages = [node.stage.name for node in refs]
    assert stages.count("sampled-backward") == stages.count("grids") == 4
    assert stages.count("sampled-loss-gradient") == 1  # shared with the cost of loss-aware
    grids = {
        module: by_spec
        for node, ref in refs.items()
        if node.stage.name == "grids"
        for module, by_spec in load_grids(store.path(ref, "grids.safetensors")).items()
    }
    for node in refs:
        if node.stage.name in ("grids", "sampled-backward"):
            manifest = store.manifest(refs[node].stage, refs[node].key)
            stored = sum(file.size_bytes for file in manifest.files.values())
            assert node.expected_bytes <= stored <= node.expected_bytes + 40_000  # headers, and the table of errors
    for checkpoint in checkpoints:
        (allocated,) = (item.node for item in [checkpoint.inputs["allocation"]])
        allocation = read_configurations(store.path(refs[allocated], ALLOCATION_FILE))
        directory = store.materialize(refs[checkpoint], tmp_path / checkpoint.label.replace(" ", "-"))
        model = lmq.load(directory, dtype=torch.float32)
        for module, spec in allocation.items():
            coded = grids[module][spec]
            assert isinstance(coded, CodedGrid)
            linear = model.get_submodule(f"model.layers.{module.layer}.{module.kind}")
            assert torch.equal(linear.dequantize(), coded.round_trip(linear.dequantize()))


def test_plain_moments_need_no_gradients(tiny_qwen: Path, tmp_path: Path) -> None:
    config = _config(tiny_qwen, tmp_path, "gptq").model_copy(update={"strategies": ()})
    graph, _ = _graph(config)
    stages = {node.stage.name for node in graph}
    assert "second-moments" in stages
    assert not stages & {"sampled-loss-gradient", "sampled-backward", "loss-gradient"}


def test_options_are_checked(tiny_qwen: Path, tmp_path: Path) -> None:
    def config(**options: object) -> RunConfig:
        return tiny_config(tiny_qwen, tmp_path, measure__quantizer="gptq", measure__quantizer_options=options)

    assert config(damping=0.05).quantizer == {"name": "gptq", "axis": 1, "damping": 0.05}
    with pytest.raises(InputError, match="damping = 7 is not allowed"):
        config(damping=7)
    with pytest.raises(InputError, match="quantizer 'gptq' does not take these options"):
        config(dampnig=0.1)
    with pytest.raises(InputError, match=r"set measure\.axis"):
        config(axis=0)


def test_strategies_are_tried_with_every_quantizer(tiny_qwen: Path, tmp_path: Path) -> None:
    def used(**options: object) -> dict[str, str]:
        config = tiny_config(tiny_qwen, tmp_path, measure__quantizer="fisher-gptq", **options)
        return {item.label: config.quantizer_of(item)["name"] for item in config.variants_of_strategies}

    assert used(strategies=["uniform", "mxq"]) == {"uniform": "fisher-gptq", "mxq": "hqq"}
    own = {"name": "uniform", "quantizer": "hqq"}
    assert used(strategies=["uniform", own]) == {"uniform": "fisher-gptq", "uniform quantizer=hqq": "hqq"}
    assert used(strategies=["mxq", own], quantizers=["hqq", "rtn"]) == {
        "mxq quantizer=hqq": "hqq",
        "mxq quantizer=rtn": "rtn",
        "uniform quantizer=hqq": "hqq",
    }
    with pytest.raises(InputError, match="unknown quantizer 'hq'; did you mean 'hqq'"):
        used(strategies=["mxq"], quantizers=["hq"])


def test_what_no_codes_go_into_is_measured_once(tiny_qwen: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_qwen,
        tmp_path,
        strategies=["kurt-boost", "sensi-boost"],
        quantizers=["hqq", "rtn"],
        measure__quantizer="rtn",
    )
    graph, checkpoints = _graph(config)
    stages = [node.stage.name for node in graph]
    assert stages.count("kurtosis") == 4
    assert stages.count("grids") == stages.count("sensitivity") == 8
    for checkpoint in checkpoints:
        name = checkpoint.config["quantizer"]["name"]
        assert f"quantizer={name}" in checkpoint.label
        layers = [node.inputs["grids"].config["quantizer"]["name"] for node in checkpoint.inputs["quantized"]]
        assert layers == [name] * 4


def test_what_is_made_of_several_quantizers_is_told_apart(tiny_qwen: Path, tmp_path: Path) -> None:
    quantizers = ["hqq", "gptq", "weighted", "fisher-gptq"]
    tried = {"strategies": ["sensi-boost", "kurt-boost", "loss-aware"], "quantizers": quantizers}
    graph, _ = _graph(tiny_config(tiny_qwen, tmp_path, **tried))
    names = [(node.stage.name, node.label) for node in graph]
    assert len(set(names)) == len(names)
    stages = [stage for stage, _ in names]
    assert stages.count("second-moments") == 4  # plain
    assert stages.count("sampled-backward") == 4  # whose second moments two of them share
    assert ("grids", "tiny gptq layer 0") in names


@pytest.mark.slow
def test_tuned_grids_are_stored_where_they_help(tiny_qwen: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_qwen,
        tmp_path,
        strategies=["uniform", "mxq"],
        budgets=["uniform b2g64"],
        measure__menu=["b2g64"],
        measure__quantizer="gptq",
        learned_rounding={"steps": 20},
        polish={"steps": 12, "sequences": 8, "rate": 0.01},
    )
    graph, checkpoints = _graph(config)
    refs = execute_directly(graph, checkpoints)
    store = ArtifactStore(config.store)
    stages = [node.stage.name for node in refs]
    assert stages.count("learned-rounding") == 4  # layers; mxq stays as published
    assert stages.count("polish") == 2  # ten steps, and two more
    tuned = {node.stage.name: refs[node] for node in refs if node.stage.name in ("learned", "polished")}
    learned, polished = (json.loads(store.path(ref, "kept.json").read_text()) for ref in tuned.values())
    for summary in (learned, polished):
        assert summary["kept"] == (summary["divergence_before"] - summary["divergence_after"] > summary["fall_stderr"])
    assert learned["kept"]
    assert polished["divergence_before"] == pytest.approx(learned["divergence_after"], rel=1e-4)
    uniform, _ = checkpoints
    model = lmq.load(store.materialize(refs[uniform], tmp_path / "opened"), dtype=torch.float32)
    for layer in range(4):
        file = f"grids-{layer:03d}.safetensors"
        for module, by_spec in load_grids(store.path(tuned["polished"], file)).items():
            ((_, grid),) = by_spec.items()
            linear = model.get_submodule(f"model.layers.{layer}.{module.kind}")
            assert torch.equal(linear.dequantize(), grid.round_trip(linear.dequantize()))
