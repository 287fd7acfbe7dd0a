"""Look at models and plan runs without starting Prefect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmq_flows.execute import Outcome, Watcher
from lmq_flows.graph import Graph, Node, resolve_inputs
from lmq_flows.pipeline import PreparedModel, TextIdentity, build_graph, resolve_budgets
from lmq_flows.plan import PlannedNode, plan_graph
from lmq_flows.prepare import (
    check_directory,
    check_texts,
    identify_models,
    identify_texts,
    preparation_graph,
    prepared_model,
    resolve_device,
)
from lmq_flows.run_config import RunConfig
from lmq_storage import ArtifactRef
from lmq_tasks.stage import open_store, run_stage, stage_key


def execute_directly(
    graph: Graph, wanted: Sequence[Node] | None = None, *, watch: Watcher | None = None
) -> dict[Node, ArtifactRef]:
    """Run nodes one after the other in this thread, without Prefect; errors are raised as they are.

    `wanted` and what they are made from; None: all. `watch` is told of every node that starts and ends.
    """
    refs: dict[Node, ArtifactRef] = {}
    for node in graph if wanted is None else graph.leading_to(wanted):
        inputs = resolve_inputs(node, {done: ref.to_json() for done, ref in refs.items()})
        store = open_store(node.site.store_url)
        key = stage_key(store, node.stage, node.config, inputs)
        if watch is not None:
            watch(node, None)
        was_there = store.find(node.stage.name, key) is not None
        refs[node] = run_stage(node.stage, key, node.site, node.config, inputs)
        if watch is not None:
            watch(node, Outcome("cached" if was_there else "ran", refs[node]))
    return refs


def check_run(config: RunConfig) -> None:
    """Refuse what can be refused before Prefect starts and anything is measured. Raises InputError.

    Models that must be converted first are checked once they are. Reads no weights.
    """
    check_directory(config.run_dir, "runs_dir")
    _Ready.of(config)


def plan_run(config: RunConfig) -> tuple[list[PlannedNode], list[str]]:
    """What a run would do, and the names of models that must be converted before more can be said.

    A model that needs no conversion is inspected on the way, which reads no weights. Raises InputError as a
    run would.
    """
    ready = _Ready.of(config)
    planned = ready.preparation
    if ready.models:
        whole, _, _ = build_graph(config, ready.models, ready.texts)
        planned = planned + plan_graph(whole)
    return planned, ready.to_convert


def ready_models(config: RunConfig) -> tuple[list[PreparedModel], dict[str, TextIdentity]]:
    """The models of a run, converted and inspected where that was not done, and its texts, checked.

    Raises InputError as a run would.
    """
    graph, _ = preparation_graph(config, identify_models(config))
    execute_directly(graph)
    ready = _Ready.of(config)
    return ready.models, ready.texts


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What a run starts from, as far as it can be had without a conversion, and checked."""

    texts: dict[str, TextIdentity]
    preparation: list[PlannedNode]
    models: list[PreparedModel]
    to_convert: list[str]

    @classmethod
    def of(cls, config: RunConfig) -> _Ready:
        device = resolve_device(config.runner.device)
        texts = identify_texts(config)
        identified = identify_models(config)
        preparation = plan_graph(preparation_graph(config, identified)[0])
        to_convert = {item.node.label for item in preparation if item.node.stage.name == "convert" and not item.cached}
        models = []
        for model in identified:
            if model.config.name in to_convert:
                continue
            only, nodes = preparation_graph(config, [model])
            node = nodes[model.config.name]
            models.append(prepared_model(config, model.config, node, execute_directly(only)[node], device))
        for ready in models:
            resolve_budgets(config, ready)
        check_texts(config, models)
        return cls(texts=texts, preparation=preparation, models=models, to_convert=sorted(to_convert))
