"""Walk a graph with Prefect: hand over work when its inputs are there, the longest chain first.

Prefect runs, retries and shows the tasks. What is decided here is only the order, and which nodes share a task: nodes
of one stage, model and variant. All that are there already are one task that Prefect shows as Cached. Of those to be
made, a task carries a chunk: what is ready, and what waits for nothing but members of the chunk, so that the serial
chain is carried many layers at a time. How many follows from how long the stage's nodes took so far: a task of Dask or
Ray costs a good part of a second, and a person who looks at the run should see stages, not hundreds of layers.
Threads tell of every node that they have made, and what waited for it can start while its chunk goes on.

Handing Prefect all tasks at once would leave the serial chain of captures waiting behind hundreds of short independent
measurements, and one core idle at the end.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import RunInput, TaskRunResult
from prefect.context import FlowRunContext
from prefect.exceptions import MissingResult
from prefect.futures import PrefectFuture
from prefect.states import State
from prefect.task_engine import run_task

from lmq.errors import InputError
from lmq_flows.graph.direct import Outcome, Watcher
from lmq_flows.graph.node import Graph, Node, joint_title, resolve_inputs
from lmq_storage import ArtifactRef
from lmq_tasks.engine import BAD_INPUT, DAMAGED_INPUT, stage_task
from lmq_tasks.stage import open_store, stage_key

LEAST_CHUNK_S = 3.0
"""Chunks are not made smaller than this to share them among workers: five to ten times what a task of Dask costs
(docs/benchmarks.md)."""


class DamagedInput(Exception):
    """An artifact was found damaged in mid run; walking the graph again makes it anew."""


Find = Callable[[Node, Mapping[Node, Any]], ArtifactRef | None]
"""The artifact of a node where it is there already, given the references of its inputs as JSON."""


def execute(
    graph: Graph, *, in_flight: int, watch: Watcher, chunk_seconds: float, elsewhere: bool = False
) -> dict[Node, Outcome]:
    """Run all nodes inside the current flow run; returns the outcome of each.

    `in_flight` tasks are with the task runner at a time, each a chunk of nodes that hold about `chunk_seconds` of work;
    `elsewhere` says that its workers are other processes. A failed node does not stop nodes that do not need it.
    Raises DamagedInput when an artifact that a node relied on turned out to be damaged, and InputError when a
    node that all variants share finds that it cannot work with what the user gave.
    """
    walk = Walk(graph, watch, in_flight=in_flight, chunk_seconds=chunk_seconds, elsewhere=elsewhere)
    try:
        while walk.unfinished:
            while walk.ready and len(walk.running) < in_flight:
                walk.submit_next()
            if walk.running:
                walk.take_one_message()
    finally:
        walk.stop()
    return walk.outcomes


@dataclass(frozen=True)
class _Submitted:
    """A chunk that is with the task runner."""

    nodes: list[Node]
    future: PrefectFuture[Any]


class Walk:
    """State of one walk over a graph; used by the flow's thread alone, except for the queue of messages.

    What is there already is settled in the flow's own process, and with workers `elsewhere` so is what only this
    machine can make.
    """

    def __init__(
        self,
        graph: Graph,
        watch: Watcher,
        *,
        in_flight: int,
        chunk_seconds: float,
        elsewhere: bool = False,
        find: Find | None = None,
    ):
        self.outcomes: dict[Node, Outcome] = {}
        self.running: dict[int, _Submitted] = {}
        self.ready: list[tuple[int, int, Node]] = []
        self._watch = watch
        self._in_flight = in_flight
        self._chunk_seconds = chunk_seconds
        self._elsewhere = elsewhere
        self._find = find or find_artifact
        self._children = graph.children()
        self._depth = graph.depth_below()
        self._order = {node: number for number, node in enumerate(graph)}
        self._like = Counter(_kind(node) for node in graph)
        self._waiting_for = {node: len(node.parents) for node in graph}
        self._under_way: set[Node] = set()
        self._alone: set[Node] = set()
        self._found: dict[Node, ArtifactRef | None] = {}
        self._seconds: dict[Any, list[float]] = defaultdict(list)
        self._task_runs: dict[Node, UUID] = {}
        self._numbers = itertools.count()
        self._stopped = False
        self._messages: queue.SimpleQueue[tuple[int, int | None, Any]] = queue.SimpleQueue()
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
        if self._is_there(first):
            self._gather(chunk, self._is_there, len(self._order), len(self._order))
        elif not self._is_done_here(first) and first not in self._alone:
            seconds = self._expected_seconds(first)
            if seconds is not None:
                share, most = (int(room / max(seconds, 1e-6)) for room in self._room(seconds))
                self._gather(chunk, lambda node: not self._is_there(node), most, share)
        self._under_way.update(chunk)
        return chunk

    def _gather(self, chunk: list[Node], belongs: Callable[[Node], bool], most: int, share: int) -> None:
        """Add nodes like the first of a chunk that belong to it, until there are `most`.

        Past the `share` of a worker only those are added that wait for the chunk: no other worker could begin them.
        """
        first = chunk[0]
        ready = [entry for entry in self.ready if self._is_alike(first, entry[2]) and belongs(entry[2])]
        heapq.heapify(ready)
        independent = {node for _, _, node in ready}
        self._offer_chained(first, chunk, ready, belongs)
        while ready and len(chunk) < most:
            node = heapq.heappop(ready)[2]
            if node in independent and len(chunk) >= share:
                continue
            chunk.append(node)
            self._offer_chained(node, chunk, ready, belongs)
        taken = set(chunk)
        self.ready = [entry for entry in self.ready if entry[2] not in taken]
        heapq.heapify(self.ready)

    def _room(self, seconds: float) -> tuple[float, float]:
        """Seconds of a worker's share of what is ready, within the limits of a chunk, and those that a chain may take.

        A chain on a thread may take all that a chunk may, since others need not wait for its end.
        """
        ready_s = seconds + sum(self._expected_seconds(node) or 0.0 for _, _, node in self.ready)
        share = max(LEAST_CHUNK_S, min(self._chunk_seconds, ready_s / self._in_flight))
        return share, share if self._elsewhere else max(share, self._chunk_seconds)

    def _offer_chained(
        self, node: Node, chunk: list[Node], ready: list[tuple[int, int, Node]], belongs: Callable[[Node], bool]
    ) -> None:
        """Add the node's children that can follow it in the chunk to those that are ready for it."""
        for child in self._children[node]:
            waits = [parent for parent in child.parents if parent not in self.outcomes and parent not in chunk]
            if not waits and child not in self.outcomes and self._is_alike(node, child) and belongs(child):
                heapq.heappush(ready, self._entry(child))

    def _is_alike(self, node: Node, other: Node) -> bool:
        return (
            _kind(other) == _kind(node)
            and other.site == node.site
            and not (other.here and self._elsewhere)
            and other not in self._alone
        )

    def _is_there(self, node: Node) -> bool:
        """Whether the store has the node's artifact; False where one of its inputs is still to be made."""
        if node not in self._found:
            refs = self._refs_of_parents(node)
            if len(refs) < len(node.parents):
                return False
            self._found[node] = self._find(node, refs)
        return self._found[node] is not None

    def _is_done_here(self, node: Node) -> bool:
        """Whether a node is one that workers elsewhere cannot make."""
        return node.here and self._elsewhere

    def _expected_seconds(self, node: Node) -> float | None:
        """The median of the nodes of its stage and model that are finished, None before there is one."""
        found = self._seconds.get((node.stage.name, node.site.model))
        return statistics.median(found) if found else None

    # ── handing over ─────────────────────────────────────────────────────────────────────────────────────

    def submit_next(self) -> None:
        """Hand the next chunk to the task runner, or settle here what is there already."""
        chunk = self.next_chunk()
        if self._is_there(chunk[0]):
            self._settle_cached(chunk)
        elif self._is_done_here(chunk[0]):
            self._watch(chunk[0], None)
            self._take_all(chunk, self._run_here(chunk, self._items(chunk)))
        else:
            self._submit(chunk)

    def _settle_cached(self, chunk: list[Node]) -> None:
        refs = [ref for node in chunk if (ref := self._found[node]) is not None]
        items = [
            {"label": node.label, "site": node.site.to_json(), "ref": ref.to_json()}
            for node, ref in zip(chunk, refs, strict=True)
        ]
        self._run_here(chunk, items)
        for node, ref in zip(chunk, refs, strict=True):
            self._watch(node, None)
            self.settle(node, Outcome("cached", ref), _seconds_to_make(node, ref) if node is chunk[0] else None)

    def _submit(self, chunk: list[Node]) -> None:
        """Hand a chunk to the task runner; where its worker is a thread, it tells how far it is."""
        context = FlowRunContext.get()
        assert context is not None, "a graph is walked inside a flow run"
        number = next(self._numbers)
        carrier, parameters, dependencies = self._call(chunk, self._items(chunk))
        if self._elsewhere:
            for node in chunk:
                self._watch(node, None)
        else:
            parameters["tell"] = partial(self._told, number)
        future = context.task_runner.submit(carrier, parameters, dependencies=dependencies)
        self.running[number] = _Submitted(chunk, future)
        self._task_runs |= dict.fromkeys(chunk, future.task_run_id)
        future.add_done_callback(lambda _: self._messages.put((number, None, None)))

    def _run_here(self, chunk: list[Node], items: list[dict[str, Any]]) -> State[Any]:
        """The state of the task of a chunk that is run in this thread."""
        carrier, parameters, dependencies = self._call(chunk, items)
        state = run_task(carrier, parameters=parameters, dependencies=dependencies, return_type="state")
        assert isinstance(state, State)
        if (task_run_id := state.state_details.task_run_id) is not None:
            self._task_runs |= dict.fromkeys(chunk, task_run_id)
        return state

    def _call(
        self, chunk: list[Node], items: list[dict[str, Any]]
    ) -> tuple[Any, dict[str, Any], dict[str, set[RunInput]]]:
        """The task that carries a chunk, its parameters, and the task runs that it takes its inputs from.

        Prefect takes a list for the result of an earlier task where that result stood at the same address (its issue
        20558), so it is made to forget results: whose inputs a task takes is known here.
        """
        first = chunk[0]
        carrier = stage_task(first.stage.name)
        parameters = {"label": joint_title(chunk), "items": items, "total": self._like[_kind(first)]}
        parents = {self._task_runs[parent] for node in chunk for parent in node.parents if parent in self._task_runs}
        if (context := FlowRunContext.get()) is not None:
            context.run_results.clear()
        return carrier, parameters, {"items": {TaskRunResult(id=run) for run in parents}}

    def _items(self, chunk: list[Node]) -> list[dict[str, Any]]:
        """The nodes of a chunk as `lmq_tasks.chunk` takes them."""
        members = {node: {"item": number} for number, node in enumerate(chunk)}
        return [
            {
                "label": node.label,
                "site": node.site.to_json(),
                "config": node.config,
                "inputs": resolve_inputs(node, {**members, **self._refs_of_parents(node)}),
            }
            for node in chunk
        ]

    def _refs_of_parents(self, node: Node) -> dict[Node, Any]:
        """References of the node's inputs that are known, as JSON."""
        refs = {
            parent: self.outcomes[parent].ref if parent in self.outcomes else self._found.get(parent)
            for parent in node.parents
        }
        return {parent: ref.to_json() for parent, ref in refs.items() if ref is not None}

    # ── taking results ───────────────────────────────────────────────────────────────────────────────────

    def take_one_message(self) -> None:
        """Wait until a node starts or is made, or a whole chunk ends, whose other nodes are settled then."""
        number, item, outcome = self._messages.get()
        if item is not None:
            self._tell(self.running[number].nodes[item], outcome)
            return
        submitted = self.running.pop(number)
        submitted.future.wait()
        self._take_all(submitted.nodes, submitted.future.state)

    def stop(self) -> None:
        """Let chunks that are with threads end after the node they work on: the walk is over, or was broken off."""
        self._stopped = True

    def _told(self, number: int, item: int, outcome: dict[str, Any] | None) -> bool:
        """Called by the threads of chunks; whether they are to go on."""
        self._messages.put((number, item, outcome))
        return not self._stopped

    def _tell(self, node: Node, found: dict[str, Any] | None) -> None:
        if node in self.outcomes:
            return  # by an earlier attempt of its task
        if found is None:
            self._watch(node, None)
        else:
            self._take(node, found)

    def _take_all(self, chunk: list[Node], state: State[Any]) -> None:
        """Settle the nodes of a chunk whose task ended in this state."""
        outcomes = _outcomes_of(state)
        if outcomes is not None:
            for node, found in zip(chunk, outcomes, strict=True):
                if node not in self.outcomes:
                    self._take(node, found)
        elif len(chunk) > 1 or (state.is_completed() and chunk[0] not in self._alone):
            self._try_one_by_one([node for node in chunk if node not in self.outcomes])
        elif chunk[0] not in self.outcomes:
            message = f"{chunk[0].label}: its worker was lost ({state.name}: {state.message or 'without a message'})"
            self._take(chunk[0], {"state": state.name, "message": message})

    def _take(self, node: Node, found: dict[str, Any]) -> None:
        if "ref" in found:
            self.settle(node, Outcome(found["state"], ArtifactRef.from_json(found["ref"])), found.get("seconds"))
        else:
            self.settle(node, _failure(node, found["state"], found["message"]))

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
            self._found.pop(node, None)  # some of them were made
            self._make_ready(node)


def find_artifact(node: Node, refs: Mapping[Node, Any]) -> ArtifactRef | None:
    """The node's artifact where the store has it; `refs` are the references of its inputs as JSON."""
    store = open_store(node.site.store_url)
    key = stage_key(store, node.stage, node.config, resolve_inputs(node, dict(refs)))
    return store.find(node.stage.name, key)


def _kind(node: Node) -> tuple[str, str, str]:
    """What nodes that share a task have in common."""
    return node.stage.name, node.model, node.what


def _outcomes_of(state: State[Any]) -> list[dict[str, Any]] | None:
    """Outcomes of a task's items; None when the task was lost before it could tell."""
    if not state.is_final() or state.is_crashed():
        return None
    try:
        found = state.result(raise_on_failure=False)
    except MissingResult:  # a server that was told twice answers with a state of its own, which holds no data
        return None
    return found if isinstance(found, list) else None


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
