"""Walking a graph: how many nodes share a task, what is lost with one, and that every node keeps its own state."""

import json

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Crashed
from prefect.task_runners import ThreadPoolTaskRunner

import lmq_tasks
from lmq.errors import InputError, LmqError
from lmq_flows.graph import walk as walk_module
from lmq_flows.graph.node import Graph
from lmq_flows.graph.walk import DamagedInput, Outcome, Walk, execute
from lmq_storage import ArtifactRef, ArtifactStore, DamagedArtifact
from lmq_tasks.chunk import node_task, run_chunk
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


def chunk_sizes(graph, seconds, workers):
    """Sizes of the chunks when each is taken for done at once, `seconds` for each of its nodes; nothing is run."""
    walk = Walk(graph, lambda *_: None, in_flight=workers, chunk_seconds=20.0, is_there=lambda *_: False)
    sizes = []
    while walk.unfinished:
        chunk = walk.next_chunk()
        sizes.append(len(chunk))
        for node in chunk:
            walk.settle(node, Outcome("ran", ArtifactRef("alone/0", "0", "t/1")), seconds)
    return sizes


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
    tmp_path, stage, layers, seconds, workers, expected
):
    assert chunk_sizes(a_graph(tmp_path, layers, stage), seconds, workers) == expected


def test_only_one_stage_and_model_share_a_chunk(tmp_path):
    graph, other = a_graph(tmp_path, 4), ModelLocation(kind="directory", place="other")
    for layer in range(4):
        graph.add(ALONE, f"n layer {layer}", Site(store_url=str(tmp_path), model=other), config={"layer": layer})
        graph.add(CHAIN, f"m layer {layer}", Site(store_url=str(tmp_path)), config={"layer": layer})
    assert chunk_sizes(graph, 0.5, 1) == [1, 3, 1, 1, 3, 3]


def walk(graph, tmp_path, workers=2, chunk_seconds=20.0, outcomes=None):
    """Walk a graph in chunks on threads; the flow's state, and label → state of every outcome that was watched.

    `outcomes` is filled with label → outcome.
    """
    watched = []

    @flow(name="walk", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=workers))
    def chunked():
        return execute(graph, in_flight=workers, watch=lambda *seen: watched.append(seen), chunk_seconds=chunk_seconds)

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "records"}):
        state = chunked(return_state=True)
    found = {node.label: outcome for node, outcome in watched if outcome is not None}
    (outcomes if outcomes is not None else {}).update(found)
    return state, {label: outcome.state for label, outcome in found.items()}


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
    assert sorted(names) == sorted(["chain m layer 1 … m layer 5", *(f"chain m layer {layer}" for layer in range(6))])
    state, seen = walk(a_graph(tmp_path, 6, CHAIN), tmp_path)
    assert set(seen.values()) == {"cached"}
    tasks = recorded_tasks(state.state_details.flow_run_id)
    assert [task.state_name for task in tasks] == ["Cached"] * 6


def test_without_chunks_every_node_is_a_task_that_knows_its_inputs(server, tmp_path):
    state, seen = walk(a_graph(tmp_path, 3, CHAIN), tmp_path, chunk_seconds=None)
    assert set(seen.values()) == {"ran"}
    tasks = {task.name: task for task in recorded_tasks(state.state_details.flow_run_id)}
    assert set(tasks) == {f"chain m layer {layer}" for layer in range(3)}
    inputs = [
        item.id for items in tasks["chain m layer 1"].task_inputs.values() for item in items if hasattr(item, "id")
    ]
    assert inputs == [tasks["chain m layer 0"].id]
    state, seen = walk(a_graph(tmp_path, 3, CHAIN), tmp_path, chunk_seconds=None)
    assert set(seen.values()) == {"cached"}
    assert [task.state_name for task in recorded_tasks(state.state_details.flow_run_id)] == ["Cached"] * 3


def test_what_was_made_before_is_not_made_again_inside_a_chunk(server, tmp_path):
    walk(a_graph(tmp_path, 3), tmp_path)
    _, seen = walk(a_graph(tmp_path, 6), tmp_path)
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["cached"] * 3 + ["ran"] * 3


@pytest.mark.parametrize("chunk_seconds", [None, 20.0], ids=["nodes", "chunks"])
def test_failed_node_leaves_the_others_of_its_chunk_alone(server, tmp_path, chunk_seconds):
    _, seen = walk(a_graph(tmp_path, 5, variant="v", how="failed", wrong=[3]), tmp_path, chunk_seconds=chunk_seconds)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
    graph = a_graph(tmp_path, 6, CHAIN, variant="v", how="bad", wrong=[3])
    _, seen = walk(graph, tmp_path, chunk_seconds=chunk_seconds)
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["ran", "ran", "ran", "failed", "not run", "not run"]


@pytest.mark.parametrize("chunk_seconds", [None, 20.0], ids=["nodes", "chunks"])
@pytest.mark.parametrize(("how", "error"), [("bad", InputError), ("damaged", DamagedInput)])
def test_what_ends_a_walk_is_raised_from_inside_a_chunk(server, tmp_path, how, error, chunk_seconds):
    state, _ = walk(a_graph(tmp_path, 4, how=how, wrong=[2]), tmp_path, chunk_seconds=chunk_seconds)
    assert isinstance(state.result(raise_on_failure=False), error)


def test_nodes_of_a_lost_chunk_are_tried_one_by_one(server, tmp_path, monkeypatch):
    """As when one layer needs more memory than its worker has, which takes the whole chunk with it."""

    def out_of_memory(**parameters):
        if any(item["config"]["layer"] == 3 for item in parameters.get("items", [parameters])):
            return Crashed(message="out of memory")
        return None

    def chunk(label, items):
        return out_of_memory(items=items) or run_chunk.fn(label, items)

    def killed(label, key, site, config, inputs):
        return out_of_memory(config=config)

    def node(**item):
        carrier, parameters, was_there = node_task(**item)
        if item["config"]["layer"] == 3:
            carrier = task(killed, name="killed", persist_result=False)
        return carrier, parameters, was_there

    monkeypatch.setattr(walk_module, "run_chunk", task(chunk, name="chunk", persist_result=False))
    monkeypatch.setattr(walk_module, "node_task", node)
    outcomes = {}
    _, seen = walk(a_graph(tmp_path, 5, variant="v"), tmp_path, outcomes=outcomes)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
    assert outcomes["m layer 3"].error == "m layer 3: its worker was lost (Crashed: out of memory)"
