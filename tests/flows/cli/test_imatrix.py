"""`lmq imatrix`: second moments of a finished run as llama-quantize reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml

from lmq.measurement.quantizer_moments import load_moments
from lmq.report.results import VariantResult, write_results
from lmq_flows.cli import main
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import build_graph
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.node import Graph, Node
from lmq_flows.run.prepare import identify_models, identify_texts, preparation_graph, prepared_model
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.states import MOMENTS_FILE
from tests.flows.cli.conftest import refusal
from tests.flows.conftest import tiny_config


def _measured(model_dir: Path, place: Path, quantizer: str) -> tuple[RunConfig, Graph, dict[Node, ArtifactRef]]:
    """A run of `uniform` that measured the model and judged nothing."""
    measure = {"menu": ["b4g64"], "quantizer": quantizer}
    config = tiny_config(model_dir, place, strategies=["uniform"], measure=measure)
    preparation, nodes = preparation_graph(config, identify_models(config))
    node = nodes["tiny"]
    model = prepared_model(config, config.models[0], node, execute_directly(preparation)[node], "cpu")
    graph, _, _ = build_graph(config, [model], identify_texts(config))
    graph.nodes = [node for node in graph if node.variant is None]
    refs = execute_directly(graph)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    write_results(config.run_dir / "results.json", [VariantResult(model="tiny", strategy="full-precision")])
    return config, graph, refs


def test_the_file_holds_the_diagonal_of_every_matrix(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, graph, refs = _measured(tiny_llama, tmp_path, "fisher-gptq")
    place = tmp_path / "im.gguf"
    assert main(["imatrix", str(config.run_dir), "-o", str(place)]) == 0
    assert "Fisher-weighted second moments of 28 matrices" in capsys.readouterr().out
    read = gguf.GGUFReader(place)
    assert read.get_field("general.type").contents() == "imatrix"
    assert read.get_field("imatrix.chunk_size").contents() == 32
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert len(tensors) == 2 * 28
    moments_of = {node.layer: refs[node] for node in graph if node.stage.name == "sampled-backward"}
    store = ArtifactStore(config.store)
    for layer, kind, name in ((0, "self_attn.q_proj", "attn_q"), (3, "mlp.down_proj", "ffn_down")):
        diagonal = load_moments(store.path(moments_of[layer], MOMENTS_FILE))[kind].matrix().diagonal().numpy()
        found = tensors[f"blk.{layer}.{name}.weight.in_sum2"]
        assert found.shape.tolist() == [len(diagonal), 1]
        np.testing.assert_allclose(found.data[0], diagonal / diagonal.mean(), rtol=1e-5)
        assert tensors[f"blk.{layer}.{name}.weight.counts"].data.tolist() == [[1.0]]

    assert "exists already" in refusal(capsys, "imatrix", config.run_dir, "-o", place)
    assert "unknown model of run 'tiny': 'tine'; did you mean 'tiny'" in refusal(
        capsys, "imatrix", config.run_dir, "-o", tmp_path / "other.gguf", "--model", "tine"
    )


def test_a_run_that_looked_at_weights_alone_has_none(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, _ = _measured(tiny_llama, tmp_path, "rtn")
    message = refusal(capsys, "imatrix", config.run_dir, "-o", tmp_path / "im.gguf")
    assert "look at weights alone" in message
    assert not (tmp_path / "im.gguf").exists()
