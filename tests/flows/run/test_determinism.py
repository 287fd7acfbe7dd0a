"""The same seed gives the same bytes, however many threads stages are scheduled on."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from lmq_flows.graph.build import build_graph
from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_flows.run.plan import ready_models
from lmq_storage import ArtifactRef
from lmq_tasks.stage import open_store, run_stage, stage_key
from tests.flows.conftest import tiny_config

SIGNALS = ["kurtosis", "sensitivity", "fisher", "sequence_fisher", "module_errors", "super_weights", "layer_activity"]


def run_on_threads(graph: Graph, nodes: list[Node], threads: int) -> dict[Node, ArtifactRef]:
    """Every node as soon as its inputs are there, the last that became ready first."""
    refs: dict[Node, ArtifactRef] = {}
    running: dict[Future[ArtifactRef], Node] = {}
    waiting = list(nodes)

    def run(node: Node, inputs: dict[str, object]) -> ArtifactRef:
        key = stage_key(open_store(node.site.store_url), node.stage, node.config, inputs)
        return run_stage(node.stage, key, node.site, node.config, inputs)

    with ThreadPoolExecutor(threads) as pool:
        while waiting or running:
            ready = [node for node in waiting if all(parent in refs for parent in node.parents)]
            for node in reversed(ready):
                waiting.remove(node)
                inputs = resolve_inputs(node, {done: ref.to_json() for done, ref in refs.items()})
                running[pool.submit(run, node, inputs)] = node
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                refs[running.pop(done)] = done.result()
    return refs


def measured(model: Path, place: Path, threads: int) -> dict[str, str]:
    """Digest of what every measuring stage made, by stage and label."""
    config = tiny_config(
        model,
        place,
        strategies=["uniform"],
        measure__menu=["b3g64", "b4g64"],
        measure__also=SIGNALS,
        calibration__sequences=2,
    )
    models, texts = ready_models(config)
    graph, _, _ = build_graph(config, models, texts)
    nodes = [node for node in graph if node.variant is None and node.stage.name != "report"]
    refs = run_on_threads(graph, graph.leading_to(nodes), threads)
    return {f"{node.stage.name} {node.label}": ref.sha256 for node, ref in refs.items()}


@pytest.mark.timeout(600)
def test_measurements_are_the_same_bytes_on_one_thread_and_on_four(tiny_qwen: Path, tmp_path: Path) -> None:
    alone = measured(tiny_qwen, tmp_path / "one", threads=1)
    together = measured(tiny_qwen, tmp_path / "four", threads=4)
    assert {name.split()[0] for name in alone} >= {"kurtosis", "sensitivity", "fisher", "sequence-fisher"}
    assert together == alone
