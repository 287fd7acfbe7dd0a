"""A checkpoint, a measured run, and what every refusal looks like."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lmq.report.results import VariantResult, write_results
from lmq_flows.cli import main
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactStore
from tests.flows.conftest import tiny_config


@pytest.fixture(scope="session")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration file, and a checkpoint made from it."""
    place = tmp_path_factory.mktemp("made")
    config = tiny_config(tiny_llama, place, strategies=["uniform"], measure__menu=["b4g64"])
    (place / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [model], identify_texts(config))
    refs = execute_directly(graph)
    checkpoint = variants[1].checkpoint
    assert checkpoint is not None
    return place / "run.yaml", ArtifactStore(config.store).materialize(refs[checkpoint], place / "checkpoint")


@pytest.fixture
def checkpoint(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to spoil."""
    path = tmp_path / "checkpoint"
    shutil.copytree(made[1], path)
    (path / "config.json").chmod(0o644)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Message of a command that must be refused: exit code 2, one message, on stderr."""
    capsys.readouterr()
    assert main([str(item) for item in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("lmq: ") == 1
    assert "Traceback" not in printed.out + printed.err
    return printed.err.strip().removeprefix("lmq: ")


def measured_run(model: Path, place: Path) -> Path:
    """The directory of a run whose measurements are in the store, with results as a run would write them."""
    config = tiny_config(
        model,
        place,
        strategies=["uniform", "mxq", {"name": "loss-aware", "options": {"fisher": "sequence"}}],
        measure__menu=["b2g64", "b3g64", "b4g64"],
    )
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    prepared = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, variants, _ = build_graph(config, [prepared], identify_texts(config))
    graph.nodes = [node for node in graph if node.variant is None]  # what is measured, once for all variants
    execute_directly(graph)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    size = variants[1].budget_bytes
    assert size is not None
    written = {"model": "tiny", "budget": "uniform b4g64", "budget_bytes": size, "perplexity": 510.0}
    write_results(
        config.run_dir / "results.json",
        [
            VariantResult(model="tiny", strategy="full-precision", perplexity=500.0),
            VariantResult(strategy="uniform", size_bytes=size, kl_divergence=0.02, **written),
            VariantResult(strategy="sensi-boost", size_bytes=size + 2_345_678, kl_divergence=0.01, **written),
            VariantResult(model="tiny", strategy="mxq", budget="uniform b4g64", error="out of memory"),
        ],
    )
    return config.run_dir


@pytest.fixture(scope="session")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run(tiny_llama, tmp_path_factory.mktemp("measured"))
