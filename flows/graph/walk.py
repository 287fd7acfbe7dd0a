"""Walk a graph with Prefect: submit every node when its inputs are there, the longest chain first.

Prefect runs, caches, retries and shows the tasks; what is decided here is only the order of submission.
Handing Prefect all tasks at once would leave the serial capture chain waiting behind hundreds of short
independent measurements, and one core idle at the end.
"""

from __future__ import annotations

import heapq
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefect.futures import PrefectFuture
from prefect.states import State

from lmq.errors import InputError
from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_flows.graph.records import record_storage
from lmq_storage import ArtifactRef
from lmq_tasks.engine import BAD_INPUT, DAMAGED_INPUT, stage_task
from lmq_tasks.stage import open_store, stage_key


@dataclass(frozen=True)
class Outcome:
    """What became of a node: `state` is "cached", "ran", "failed" or "not run" (an input failed)."""

    state: str
    ref: ArtifactRef | None = None
    error: str | None = None


class DamagedInput(Exception):
    """An artifact was found damaged in mid run; walking the graph again makes it anew."""


Watcher = Callable[[Node, Outcome | None], None]
"""Called with a node and None when it starts, with its outcome when it ends."""


def execute(graph: Graph, *, in_flight: int, watch: Watcher, chunk_seconds: float | None = None) -> dict[Node, Outcome]:
    """Run all nodes inside the current flow run; returns the outcome of each.

    `in_flight` tasks are with the task runner at a time: nodes, or with `chunk_seconds` chunks of nodes that hold about
    so much work, for runners whose tasks are dear. A failed node leaves what does not need it alone.
    Raises DamagedInput when an artifact that a node relied on turned out to be damaged, and InputError when a
    node that all variants share finds that it cannot work with what the user gave.
    """
    from lmq_flows.graph.chunks import ChunkedWalk

    walk = Walk(graph, watch) if chunk_seconds is None else ChunkedWalk(graph, watch, in_flight, chunk_seconds)
    while walk.unfinished:
        while walk.ready and len(walk.running) < in_flight:
            walk.submit_next()
        if walk.running:
            walk.take_one_result()
    return walk.outcomes


class Walk:
    """State of one walk over a graph; used by the flow's thread alone, except for the queue of results."""

    def __init__(self, graph: Graph, watch: Watcher):
        self.outcomes: dict[Node, Outcome] = {}
        self.running: dict[Any, PrefectFuture[Any]] = {}
        self.ready: list[tuple[int, int, Node]] = []
        self._watch = watch
        self._children = graph.children()
        self._depth = graph.depth_below()
        self._order = {node: number for number, node in enumerate(graph)}
        self._waiting_for = {node: len(node.parents) for node in graph}
        self._finished: dict[Node, PrefectFuture[Any]] = {}
        self._was_there: set[Node] = set()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for node in graph:
            if not node.parents:
                self._make_ready(node)

    @property
    def unfinished(self) -> bool:
        """Whether nodes are left without an outcome."""
        return len(self.outcomes) < len(self._order)

    def _make_ready(self, node: Node) -> None:
        heapq.heappush(self.ready, self._entry(node))

    def _entry(self, node: Node) -> tuple[int, int, Node]:
        """What ready nodes are sorted by: the longest chain first."""
        return -self._depth[node], self._order[node], node

    def submit_next(self) -> None:
        """Hand the first ready node to the task runner."""
        _, _, node = heapq.heappop(self.ready)
        store = open_store(node.site.store_url)
        key = stage_key(store, node.stage, node.config, resolve_inputs(node, self._refs_of_parents(node)))
        if store.find(node.stage.name, key) is not None:
            self._was_there.add(node)
        task = stage_task(node.stage.name).with_options(
            refresh_cache=node not in self._was_there,
            result_storage=record_storage(node.site.store_url),
            tags=node.tags,
        )
        self._watch(node, None)
        future = task.submit(
            label=f"{node.stage.name} {node.label}",
            key=key,
            site=node.site.to_json(),
            config=node.config,
            inputs=resolve_inputs(node, dict(self._finished.items())),
        )
        self.running[node] = future
        future.add_done_callback(lambda _: self._results.put(node))

    def _refs_of_parents(self, node: Node) -> dict[Node, Any]:
        return {parent: ref.to_json() for parent in node.parents if (ref := self.outcomes[parent].ref) is not None}

    def take_one_result(self) -> None:
        """Wait for a node to end and settle it."""
        node = self._results.get()
        future = self.running.pop(node)
        self._finished[node] = future
        self._settle(node, _outcome(node, future, node in self._was_there))

    def _settle(self, node: Node, outcome: Outcome) -> None:
        self.outcomes[node] = outcome
        self._watch(node, outcome)
        for child in self._children[node]:
            if child in self.outcomes:
                continue
            if outcome.ref is None:
                self._settle(child, Outcome("not run", error=outcome.error))
                continue
            self._waiting_for[child] -= 1
            if self._waiting_for[child] == 0:
                self._make_ready(child)


def _outcome(node: Node, future: PrefectFuture[Any], was_there: bool) -> Outcome:
    future.wait()
    state: State[Any] = future.state
    if state.is_completed():
        return Outcome("cached" if was_there else "ran", ArtifactRef.from_json(state.result()))
    return failure(node, state.name, state.message or "failed without a message")


def failure(node: Node, state: str | None, message: str) -> Outcome:
    """The outcome of a node that ended in a state of this name. Raises what ends the walk."""
    if state == DAMAGED_INPUT:
        raise DamagedInput(message)
    if state == BAD_INPUT and node.variant is None:
        raise InputError(message)
    return Outcome("failed", error=message)
