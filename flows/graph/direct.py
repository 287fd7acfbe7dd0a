"""Run a graph's nodes one after the other in this process, without Prefect, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_storage import ArtifactRef
from lmq_tasks.stage import open_store, run_stage, stage_key


@dataclass(frozen=True)
class Outcome:
    """What became of a node: `state` is "cached", "ran", "failed" or "not run" (an input failed)."""

    state: str
    ref: ArtifactRef | None = None
    error: str | None = None


Watcher = Callable[[Node, Outcome | None], None]
"""Called with a node and None when it starts, with its outcome when it ends."""


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
