"""Look at models and plan runs without starting Prefect."""

from __future__ import annotations

from lmq.structure import ModelStructure
from lmq_flows.graph import Graph, Node, resolve_inputs
from lmq_flows.pipeline import build_graph, resolve_budgets
from lmq_flows.plan import PlannedNode, plan_graph
from lmq_flows.prepare import (
    identify_models,
    identify_texts,
    preparation_graph,
    prepared_model,
    resolve_device,
)
from lmq_flows.run_config import ModelConfig, RunConfig, StrategyConfig
from lmq_storage import ArtifactRef
from lmq_tasks.stage import open_store, run_stage, stage_key


def execute_directly(graph: Graph) -> dict[Node, ArtifactRef]:
    """Run all nodes one after the other in this thread, without Prefect; errors are raised as they are."""
    refs: dict[Node, ArtifactRef] = {}
    for node in graph:
        inputs = resolve_inputs(node, {done: ref.to_json() for done, ref in refs.items()})
        key = stage_key(open_store(node.site.store_url), node.stage, node.config, inputs)
        refs[node] = run_stage(node.stage, key, node.site, node.config, inputs)
    return refs


def plan_run(config: RunConfig) -> tuple[list[PlannedNode], list[str]]:
    """What a run would do, and the names of models that must be converted before more can be said.

    A model that needs no conversion is inspected on the way, which reads no weights.
    """
    texts = identify_texts(config)
    identified = identify_models(config)
    planned = plan_graph(preparation_graph(config, identified)[0])
    to_convert = {item.node.label for item in planned if item.node.stage.name == "convert" and not item.cached}
    prepared = []
    for model in identified:
        if model.config.name in to_convert:
            continue
        only, nodes = preparation_graph(config, [model])
        node = nodes[model.config.name]
        prepared.append(prepared_model(config, model.config, node, execute_directly(only)[node], _device(config)))
    for ready in prepared:
        resolve_budgets(config, ready)
    if prepared:
        whole, _, _ = build_graph(config, prepared, texts)
        planned += plan_graph(whole)
    return planned, sorted(to_convert)


def inspect_model(model: ModelConfig, store: str) -> ModelStructure:
    """Structure of a model; a GGUF file is converted into the store first."""
    config = RunConfig(
        name="inspect", models=(model,), strategies=(StrategyConfig(name="uniform"),), budgets=("8",), store=store
    )
    identified = identify_models(config)
    graph, structures = preparation_graph(config, identified)
    node = structures[model.name]
    return prepared_model(config, model, node, execute_directly(graph)[node], "cpu").structure


def _device(config: RunConfig) -> str:
    return resolve_device(config.runner.device)
