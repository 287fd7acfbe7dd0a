"""Walk a graph with Prefect: hand over work when its inputs are there, the longest chain first.

Prefect runs, caches, retries and shows the tasks. What is decided here is only the order, and how many nodes share a
task. Handing Prefect all tasks at once would leave the serial chain of captures waiting behind hundreds of short
independent measurements, and one core idle at the end.

A task costs a few milliseconds on threads, where every chunk is one node. With Dask and Ray it costs a good part of a
second, so a task carries a chunk of nodes of one stage and model: those that are ready, and those that wait for nothing
but members of the chunk, so that the serial chain is carried many layers at a time. How many follows from how long the
stage's nodes took so far.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import RunInput, TaskRunResult
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from lmq.errors import InputError
from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_flows.graph.records import record_storage
from lmq_storage import ArtifactRef
from lmq_tasks.chunk import node_outcome, node_task, run_chunk, run_node
from lmq_tasks.engine import BAD_INPUT, DAMAGED_INPUT
from lmq_tasks.stage import open_store, run_stage, stage_key

LEAST_CHUNK_S = 3.0
"""Chunks are not made smaller than this to share them among workers: five to ten times what a task of Dask costs
(docs/benchmarks.md)."""


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

IsThere = Callable[[Node, Mapping[Node, Any]], bool]
"""Whether the artifact of a node is there already, given the references of its inputs as JSON."""


def execute(graph: Graph, *, in_flight: int, watch: Watcher, chunk_seconds: float | None = None) -> dict[Node, Outcome]:
    """Run all nodes inside the current flow run; returns the outcome of each.

    `in_flight` tasks are with the task runner at a time. Each is one node; for runners of other processes, each is a
    chunk of nodes that hold about `chunk_seconds` of work. A failed node does not stop nodes that do not need it.
    Raises DamagedInput when an artifact that a node relied on turned out to be damaged, and InputError when a
    node that all variants share finds that it cannot work with what the user gave.
    """
    walk = Walk(graph, watch, in_flight=in_flight, chunk_seconds=chunk_seconds)
    while walk.unfinished:
        while walk.ready and len(walk.running) < in_flight:
            walk.submit_next()
        if walk.running:
            walk.take_one_result()
    return walk.outcomes


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


@dataclass(frozen=True)
class _Submitted:
    """A chunk that is with the task runner; `was_there` is told of a chunk of one node."""

    nodes: list[Node]
    future: PrefectFuture[Any]
    was_there: bool = False


class Walk:
    """State of one walk over a graph; used by the flow's thread alone, except for the queue of results.

    With chunks, what is there already, and what only this machine can make, is done in the flow's own process.
    """

    def __init__(
        self,
        graph: Graph,
        watch: Watcher,
        *,
        in_flight: int,
        chunk_seconds: float | None = None,
        is_there: IsThere | None = None,
    ):
        self.outcomes: dict[Node, Outcome] = {}
        self.running: dict[int, _Submitted] = {}
        self.ready: list[tuple[int, int, Node]] = []
        self._watch = watch
        self._in_flight = in_flight
        self._chunk_seconds = chunk_seconds
        self._looked_up = is_there or artifact_is_there
        self._children = graph.children()
        self._depth = graph.depth_below()
        self._order = {node: number for number, node in enumerate(graph)}
        self._waiting_for = {node: len(node.parents) for node in graph}
        self._under_way: set[Node] = set()
        self._alone: set[Node] = set()
        self._there: dict[Node, bool] = {}
        self._seconds: dict[Any, list[float]] = defaultdict(list)
        self._task_runs: dict[Node, UUID] = {}
        self._numbers = itertools.count()
        self._results: queue.SimpleQueue[int] = queue.SimpleQueue()
        for node in graph:
            self._make_ready(node)

    @property
    def unfinished(self) -> bool:
        """Whether nodes are left without an outcome."""
        return len(self.outcomes) < len(self._order)

    def _make_ready(self, node: Node) -> None:
        if self._waiting_for[node] == 0 and node not in self._under_way:
            heapq.heappush(self.ready, self._entry(node))

    def _entry(self, node: Node) -> tuple[int, int, Node]:
        """What ready nodes are sorted by: the longest chain first."""
        return -self._depth[node], self._order[node], node

    # ── what shares a task ───────────────────────────────────────────────────────────────────────────────

    def next_chunk(self) -> list[Node]:
        """Take the first ready node off the ready ones, with the nodes that share its task."""
        first = heapq.heappop(self.ready)[2]
        chunk = [first]
        if self._chunk_seconds is not None and not self._is_done_here(first) and first not in self._alone:
            seconds = self._expected_seconds(first)
            if seconds is not None:
                self._fill(chunk, seconds, self._room(seconds, self._chunk_seconds))
        self._under_way.update(chunk)
        return chunk

    def _fill(self, chunk: list[Node], seconds: float, room: float) -> None:
        """Add nodes like the first of a chunk, `seconds` each, until they fill `room` seconds."""
        first = chunk[0]
        ready = [entry for entry in self.ready if self._is_alike(first, entry[2]) and not self._is_there(entry[2])]
        heapq.heapify(ready)
        self._offer_chained(first, chunk, ready)
        while ready and (len(chunk) + 1) * seconds <= room:
            node = heapq.heappop(ready)[2]
            chunk.append(node)
            self._offer_chained(node, chunk, ready)
        taken = set(chunk)
        self.ready = [entry for entry in self.ready if entry[2] not in taken]
        heapq.heapify(self.ready)

    def _room(self, seconds: float, most: float) -> float:
        """Seconds that a chunk may take: a worker's share of what is ready, within the limits of a chunk."""
        ready_s = seconds + sum(self._expected_seconds(node) or 0.0 for _, _, node in self.ready)
        return max(LEAST_CHUNK_S, min(most, ready_s / self._in_flight))

    def _offer_chained(self, node: Node, chunk: list[Node], ready: list[tuple[int, int, Node]]) -> None:
        """Add the node's children that can follow it in the chunk to those that are ready for it."""
        for child in self._children[node]:
            waits = [parent for parent in child.parents if parent not in self.outcomes and parent not in chunk]
            if not waits and child not in self.outcomes and self._is_alike(node, child):
                heapq.heappush(ready, self._entry(child))

    def _is_alike(self, node: Node, other: Node) -> bool:
        return other.stage is node.stage and other.site == node.site and not other.here and other not in self._alone

    def _is_there(self, node: Node) -> bool:
        if node not in self._there:
            self._there[node] = self._looked_up(node, self._refs_of_parents(node))
        return self._there[node]

    def _is_done_here(self, node: Node) -> bool:
        """Whether a node is worth no task of another process."""
        return self._chunk_seconds is not None and (node.here or self._is_there(node))

    def _expected_seconds(self, node: Node) -> float | None:
        """The median of the nodes of its stage and model that are finished, None before there is one."""
        found = self._seconds.get((node.stage.name, node.site.model))
        return statistics.median(found) if found else None

    # ── handing over ─────────────────────────────────────────────────────────────────────────────────────

    def submit_next(self) -> None:
        """Hand the next chunk to the task runner, or do its one node here."""
        chunk = self.next_chunk()
        for node in chunk:
            self._watch(node, None)
        if self._is_done_here(chunk[0]):
            self._take(chunk[0], run_node(**self._items(chunk)[0], **_options(chunk[0])))
            return
        number = next(self._numbers)
        self.running[number] = submitted = self._submit(chunk)
        self._task_runs |= dict.fromkeys(chunk, submitted.future.task_run_id)
        submitted.future.add_done_callback(lambda _: self._results.put(number))

    def _submit(self, chunk: list[Node]) -> _Submitted:
        """Hand a chunk to the task runner, telling Prefect which tasks it takes its inputs from."""
        context = FlowRunContext.get()
        assert context is not None, "a graph is walked inside a flow run"
        items = self._items(chunk)
        was_there = False
        if len(chunk) == 1:
            task, parameters, was_there = node_task(**items[0], **_options(chunk[0]))
            takes = "inputs"
        else:
            task = run_chunk.with_options(**_options(chunk[0]))
            label = f"{chunk[0].stage.name} {chunk[0].label} … {chunk[-1].label}"
            parameters = {"label": label, "items": items}
            takes = "items"
        parents = {self._task_runs[parent] for node in chunk for parent in node.parents if parent in self._task_runs}
        dependencies: dict[str, set[RunInput]] = {takes: {TaskRunResult(id=run) for run in parents}}
        return _Submitted(chunk, context.task_runner.submit(task, parameters, dependencies=dependencies), was_there)

    def _items(self, chunk: list[Node]) -> list[dict[str, Any]]:
        """The nodes of a chunk as `lmq_tasks.chunk` takes them."""
        members = {node: {"item": number} for number, node in enumerate(chunk)}
        return [
            {
                "stage": node.stage.name,
                "label": node.label,
                "site": node.site.to_json(),
                "config": node.config,
                "inputs": resolve_inputs(node, {**members, **self._refs_of_parents(node)}),
                "tags": list(node.tags),
            }
            for node in chunk
        ]

    def _refs_of_parents(self, node: Node) -> dict[Node, Any]:
        done = {parent: self.outcomes[parent].ref for parent in node.parents if parent in self.outcomes}
        return {parent: ref.to_json() for parent, ref in done.items() if ref is not None}

    # ── taking results ───────────────────────────────────────────────────────────────────────────────────

    def take_one_result(self) -> None:
        """Wait for a chunk to end and settle its nodes."""
        submitted = self.running.pop(self._results.get())
        submitted.future.wait()
        state, chunk = submitted.future.state, submitted.nodes
        if len(chunk) == 1:
            found = node_outcome(state, submitted.was_there)
            if state.is_crashed() or not state.is_final():
                found["message"] = f"{chunk[0].label}: its worker was lost ({state.name}: {found['message']})"
            self._take(chunk[0], found)
        elif not state.is_completed():
            self._try_one_by_one(chunk)
        else:
            for node, found in zip(chunk, state.result(), strict=True):
                if node not in self.outcomes:
                    self._take(node, found)

    def _take(self, node: Node, found: dict[str, Any]) -> None:
        if "ref" not in found:
            self.settle(node, _failure(node, found["state"], found["message"]))
            return
        ref = ArtifactRef.from_json(found["ref"])
        seconds = None
        if self._chunk_seconds is not None:
            seconds = found.get("seconds") or _seconds_to_make(node, ref)
        self.settle(node, Outcome(found["state"], ref), seconds)

    def settle(self, node: Node, outcome: Outcome, seconds: float | None = None) -> None:
        """Note what became of a node and how long it took to make, and make ready what waited for it alone."""
        if seconds is not None:
            self._seconds[node.stage.name, node.site.model].append(seconds)
        self._under_way.discard(node)
        self.outcomes[node] = outcome
        self._watch(node, outcome)
        for child in self._children[node]:
            if child in self.outcomes:
                continue
            if outcome.ref is None:
                self.settle(child, Outcome("not run", error=outcome.error))
                continue
            self._waiting_for[child] -= 1
            self._make_ready(child)

    def _try_one_by_one(self, chunk: list[Node]) -> None:
        """Make the nodes of a lost chunk ready again, each for a task of its own: one may have ended the worker."""
        self._under_way.difference_update(chunk)
        self._alone.update(chunk)
        for node in chunk:
            self._make_ready(node)


def artifact_is_there(node: Node, refs: Mapping[Node, Any]) -> bool:
    """Whether the store has the node's artifact; `refs` are the references of its inputs as JSON."""
    store = open_store(node.site.store_url)
    key = stage_key(store, node.stage, node.config, resolve_inputs(node, dict(refs)))
    return store.find(node.stage.name, key) is not None


def _options(node: Node) -> dict[str, Any]:
    """Options of the Prefect task that carries a node."""
    return {"result_storage": record_storage(node.site.store_url)}


def _seconds_to_make(node: Node, ref: ArtifactRef) -> float | None:
    manifest = open_store(node.site.store_url).manifest(ref.stage, ref.key)
    return None if manifest is None else manifest.seconds


def _failure(node: Node, state: str | None, message: str) -> Outcome:
    """The outcome of a node that ended in a state of this name. Raises what ends the walk."""
    if state == DAMAGED_INPUT:
        raise DamagedInput(message)
    if state == BAD_INPUT and node.variant is None:
        raise InputError(message)
    return Outcome("failed", error=message)
