"""Chunks of nodes: how many share a task, what is lost with one, and that every node keeps its own state."""

import heapq
import json

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Crashed
from prefect.task_runners import ThreadPoolTaskRunner

import lmq_tasks
from lmq.errors import InputError, LmqError
from lmq_flows.graph import chunks
from lmq_flows.graph.chunks import ChunkedWalk
from lmq_flows.graph.node import Graph
from lmq_flows.graph.walk import DamagedInput, Outcome, execute
from lmq_storage import ArtifactStore, DamagedArtifact
from lmq_tasks.chunk import run_chunk
from lmq_tasks.stage import ModelLocation, Site, Stage
from tests.flows.conftest import recorded_tasks

ERRORS = {"bad": InputError("no such thing"), "failed": LmqError("cannot be done"), "damaged": DamagedArtifact("gone")}


def work(job):
    if job.config["layer"] in job.config.get("wrong", ()):
        raise ERRORS[job.config["how"]]
    before = job.input("before", "value.json").read_text() if job.has("before") else "[]"
    (job.output / "value.json").write_text(json.dumps([*json.loads(before), job.config["layer"]]))


ALONE, CHAIN = Stage("alone", 1, "t/1", work), Stage("chain", 1, "t/1", work)


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch):
    for stage in (ALONE, CHAIN):
        monkeypatch.setitem(lmq_tasks.STAGES, stage.name, stage)


def a_graph(store, layers, stage=ALONE, variant=None, **config):
    """Layers that do not depend on each other, or each on the one before."""
    graph, site, before = Graph(), Site(store_url=str(store)), []
    for layer in range(layers):
        inputs = {"before": before[-1]} if before and stage is CHAIN else {}
        before.append(
            graph.add(
                stage, f"m layer {layer}", site, config={"layer": layer, **config}, inputs=inputs, variant=variant
            )
        )
    return graph


class Planned(ChunkedWalk):
    """Takes every chunk for done at once, `seconds` for each of its nodes; nothing is run."""

    def __init__(self, graph, seconds, workers, chunk_seconds=20.0):
        self.chunks, self.seconds = [], seconds
        super().__init__(graph, lambda *_: None, workers, chunk_seconds)

    def submit_next(self):
        chunk = self._chunk_from(heapq.heappop(self.ready)[2])
        self.chunks.append(len(chunk))
        self._under_way.update(chunk)
        for node in chunk:
            self._costs.note(node, self.seconds)
            self._settle(node, Outcome("ran", Site))

    def walked(self):
        while self.unfinished:
            self.submit_next()
        return self.chunks


@pytest.fixture
def nothing_is_there(monkeypatch):
    monkeypatch.setattr(ChunkedWalk, "_is_there", lambda *_: False)


@pytest.mark.parametrize(
    ("stage", "layers", "seconds", "workers", "expected"),
    [
        (ALONE, 121, 1.0, 2, [1, 20, 20, 20, 20, 20, 10, 5, 3, 2]),
        (ALONE, 31, 0.1, 2, [1, 30]),
        (ALONE, 4, 40.0, 2, [1, 1, 1, 1]),
        (CHAIN, 9, 1.0, 1, [1, 3, 3, 2]),
        (CHAIN, 3, 30.0, 1, [1, 1, 1]),
    ],
)
def test_first_node_is_tried_alone_then_chunks_hold_a_share_of_the_work(
    nothing_is_there, tmp_path, stage, layers, seconds, workers, expected
):
    assert Planned(a_graph(tmp_path, layers, stage), seconds, workers).walked() == expected


def test_only_one_stage_and_model_share_a_chunk(nothing_is_there, tmp_path):
    graph, other = a_graph(tmp_path, 4), ModelLocation(kind="directory", place="other")
    for layer in range(4):
        graph.add(ALONE, f"n layer {layer}", Site(store_url=str(tmp_path), model=other), config={"layer": layer})
        graph.add(CHAIN, f"m layer {layer}", Site(store_url=str(tmp_path)), config={"layer": layer})
    assert Planned(graph, 0.5, 1).walked() == [1, 3, 1, 1, 3, 3]


def walk(graph, tmp_path, workers=2):
    """Walk a graph in chunks on threads; the flow's state, and (label, state) of every outcome that was watched."""
    watched = []

    @flow(name="walk", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=workers))
    def chunked():
        return execute(graph, in_flight=workers, watch=lambda *seen: watched.append(seen), chunk_seconds=20.0)

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "records"}):
        state = chunked(return_state=True)
    return state, {node.label: outcome.state for node, outcome in watched if outcome is not None}


def values(store, stage):
    manifests = list(ArtifactStore(str(store)).manifests(stage))
    paths = [ArtifactStore(str(store)).path(manifest.ref, "value.json") for manifest in manifests]
    return sorted(json.loads(path.read_text()) for path in paths)


def test_a_chain_is_carried_by_few_tasks_and_every_node_keeps_its_artifact(server, tmp_path):
    state, seen = walk(a_graph(tmp_path, 6, CHAIN), tmp_path)
    assert state.is_completed()
    assert seen == {f"m layer {layer}": "ran" for layer in range(6)}
    assert values(tmp_path, "chain") == [list(range(length)) for length in range(1, 7)]
    names = [task.name for task in recorded_tasks(state.state_details.flow_run_id)]
    assert sorted(names) == sorted(
        ["chain m layer 0", "chain m layer 1 … m layer 5", *(f"chain m layer {layer}" for layer in range(6))]
    )
    state, seen = walk(a_graph(tmp_path, 6, CHAIN), tmp_path)
    assert set(seen.values()) == {"cached"}
    tasks = recorded_tasks(state.state_details.flow_run_id)
    assert [task.state_name for task in tasks] == ["Cached"] * 6


def test_what_was_made_before_is_not_made_again_inside_a_chunk(server, tmp_path):
    walk(a_graph(tmp_path, 3), tmp_path)
    _, seen = walk(a_graph(tmp_path, 6), tmp_path)
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["cached"] * 3 + ["ran"] * 3


def test_failed_node_leaves_the_others_of_its_chunk_alone(server, tmp_path):
    _, seen = walk(a_graph(tmp_path, 5, variant="v", how="failed", wrong=[3]), tmp_path)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
    _, seen = walk(a_graph(tmp_path, 6, CHAIN, variant="v", how="bad", wrong=[3]), tmp_path)
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["ran", "ran", "ran", "failed", "not run", "not run"]


@pytest.mark.parametrize(("how", "error"), [("bad", InputError), ("damaged", DamagedInput)])
def test_what_ends_a_walk_is_raised_from_inside_a_chunk(server, tmp_path, how, error):
    state, _ = walk(a_graph(tmp_path, 4, how=how, wrong=[2]), tmp_path)
    assert isinstance(state.result(raise_on_failure=False), error)


def test_nodes_of_a_lost_chunk_are_tried_one_by_one(server, tmp_path, monkeypatch):
    """As when one layer needs more memory than its worker has, which takes the whole chunk with it."""

    def run(label, items):
        if any(item["config"]["layer"] == 3 for item in items):
            return Crashed(message="out of memory")
        return run_chunk.fn(label, items)

    monkeypatch.setattr(chunks, "run_chunk", task(run, name="chunk", persist_result=False))
    _, seen = walk(a_graph(tmp_path, 5, variant="v"), tmp_path)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
