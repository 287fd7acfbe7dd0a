"""Walk a graph with tasks that carry chunks of nodes, for runners whose tasks cost a good part of a second.

Only nodes of one stage and model share a chunk: those that are ready, and those that wait for nothing but members of
the chunk, so that the serial chain of captures is carried many layers at a time. How many there are follows from how
long the stage's nodes took so far.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import defaultdict
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import RunInput, State, TaskRunResult
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_flows.graph.records import record_storage
from lmq_flows.graph.walk import Outcome, Walk, Watcher, failure
from lmq_storage import ArtifactRef
from lmq_tasks.chunk import run_chunk, run_node
from lmq_tasks.stage import open_store, stage_key

LEAST_CHUNK_S = 3.0
"""Chunks are not made smaller than this to share them among workers: five to ten times what a task of Dask costs
(docs/benchmarks.md)."""


class StageSeconds:
    """How long nodes of a stage took for a model, as told by those that are finished."""

    def __init__(self) -> None:
        self._seconds: dict[Any, list[float]] = defaultdict(list)

    def note(self, node: Node, seconds: float) -> None:
        """Take note of a node that ran for so long."""
        self._seconds[node.stage.name, node.site.model].append(seconds)

    def of(self, node: Node) -> float | None:
        """The median of the stage's finished nodes, None before there is one."""
        found = self._seconds.get((node.stage.name, node.site.model))
        return statistics.median(found) if found else None


class ChunkedWalk(Walk):
    """State of one walk over a graph in chunks.

    What is there already, and what only this machine can make, is done in the flow's own process.
    """

    def __init__(self, graph: Graph, watch: Watcher, in_flight: int, chunk_seconds: float):
        self._carried: dict[int, list[Node]] = {}
        self._under_way: set[Node] = set()
        self._alone: set[Node] = set()
        self._there: dict[Node, bool] = {}
        self._task_runs: dict[Node, UUID] = {}
        self._numbers = itertools.count()
        self._in_flight = in_flight
        self._chunk_seconds = chunk_seconds
        self._costs = StageSeconds()
        super().__init__(graph, watch)

    # ── submitting ───────────────────────────────────────────────────────────────────────────────────────

    def submit_next(self) -> None:
        """Hand over the chunk that begins with the first ready node, or do that node here."""
        _, _, node = heapq.heappop(self.ready)
        if node.here or self._is_there(node):
            self._run_here(node)
            return
        chunk = self._chunk_from(node)
        number = next(self._numbers)
        self._carried[number] = chunk
        self._under_way.update(chunk)
        for member in chunk:
            self._watch(member, None)
        self.running[number] = future = self._submit(chunk)
        self._task_runs |= dict.fromkeys(chunk, future.task_run_id)
        future.add_done_callback(lambda _: self._results.put(number))

    def _submit(self, chunk: list[Node]) -> PrefectFuture[Any]:
        """Hand a chunk to the task runner, telling Prefect which tasks it takes its inputs from."""
        context = FlowRunContext.get()
        assert context is not None, "a graph is walked inside a flow run"
        first, last = chunk[0], chunk[-1]
        label = f"{first.stage.name} {first.label}" + (f" … {last.label}" if len(chunk) > 1 else "")
        parents = {self._task_runs[parent] for node in chunk for parent in node.parents if parent in self._task_runs}
        dependencies: dict[str, set[RunInput]] = {"items": {TaskRunResult(id=run) for run in parents}}
        parameters = {"label": label, "items": self._items(chunk)}
        carrier = run_chunk.with_options(result_storage=record_storage(first.site.store_url))
        return context.task_runner.submit(carrier, parameters, dependencies=dependencies)

    def _items(self, chunk: list[Node]) -> list[dict[str, Any]]:
        carried = {node: {"item": number} for number, node in enumerate(chunk)}
        items = []
        for node in chunk:
            done = {parent: self.outcomes[parent].ref for parent in node.parents if parent in self.outcomes}
            refs = {parent: ref.to_json() for parent, ref in done.items() if ref is not None}
            items.append(_as_item(node, resolve_inputs(node, {**carried, **refs})))
        return items

    def _chunk_from(self, first: Node) -> list[Node]:
        """The first node with others alike, as many as there is room for; taken off the ready ones."""
        seconds = self._costs.of(first)
        if seconds is None or first in self._alone:
            return [first]
        chunk, room = [first], self._room(seconds)
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
        return chunk

    def _room(self, seconds: float) -> float:
        """Seconds that a chunk may take: a worker's share of what is ready, within the limits of a chunk."""
        ready_s = seconds + sum(self._costs.of(node) or 0.0 for _, _, node in self.ready)
        return max(LEAST_CHUNK_S, min(self._chunk_seconds, ready_s / self._in_flight))

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
            store = open_store(node.site.store_url)
            key = stage_key(store, node.stage, node.config, resolve_inputs(node, self._refs_of_parents(node)))
            self._there[node] = store.find(node.stage.name, key) is not None
        return self._there[node]

    def _run_here(self, node: Node) -> None:
        self._watch(node, None)
        inputs = resolve_inputs(node, self._refs_of_parents(node))
        found = run_node(
            **_as_item(node, inputs),
            result_storage=record_storage(node.site.store_url),
        )
        self._take(node, found)
        if found["state"] == "cached":
            ref = ArtifactRef.from_json(found["ref"])
            manifest = open_store(node.site.store_url).manifest(ref.stage, ref.key)
            if manifest is not None and manifest.seconds is not None:
                self._costs.note(node, manifest.seconds)

    # ── taking results ───────────────────────────────────────────────────────────────────────────────────

    def take_one_result(self) -> None:
        """Wait for a chunk to end and settle its nodes."""
        number = self._results.get()
        chunk, future = self._carried.pop(number), self.running.pop(number)
        future.wait()
        state: State[Any] = future.state
        if not state.is_completed():
            self._chunk_was_lost(chunk, state)
            return
        for node, found in zip(chunk, state.result(), strict=True):
            if node not in self.outcomes:
                self._take(node, found)
        self._under_way.difference_update(chunk)

    def _take(self, node: Node, found: dict[str, Any]) -> None:
        if "ref" not in found:
            self._settle(node, failure(node, found["state"], found["message"]))
            return
        if found["state"] == "ran":
            self._costs.note(node, found["seconds"])
        self._settle(node, Outcome(found["state"], ArtifactRef.from_json(found["ref"])))

    def _chunk_was_lost(self, chunk: list[Node], state: State[Any]) -> None:
        """Try the nodes of a chunk again one by one, since one of them may have ended its worker; fail a single one."""
        self._under_way.difference_update(chunk)
        if len(chunk) == 1:
            message = f"{chunk[0].label}: its worker was lost ({state.name}: {state.message or 'no message'})"
            self._settle(chunk[0], failure(chunk[0], state.name, message))
            return
        self._alone.update(chunk)
        for node in chunk:
            if self._waiting_for[node] == 0:
                self._make_ready(node)

    def _make_ready(self, node: Node) -> None:
        if node not in self._under_way:
            super()._make_ready(node)


def _as_item(node: Node, inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": node.stage.name,
        "label": node.label,
        "site": node.site.to_json(),
        "config": node.config,
        "inputs": inputs,
        "tags": list(node.tags),
    }
