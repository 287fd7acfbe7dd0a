"""Walking a graph: how many nodes share a task, what is lost with one, and that every node keeps its own state."""

import json
import threading
import time
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import RunType
from prefect.context import FlowRunContext
from prefect.states import Completed, Crashed
from prefect.task_runners import ThreadPoolTaskRunner

import lmq_tasks
from lmq.errors import InputError, LmqError
from lmq_flows.graph import walk as walk_module
from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.node import Graph
from lmq_flows.graph.walk import DamagedInput, Walk, execute
from lmq_storage import ArtifactRef, ArtifactStore, DamagedArtifact
from lmq_storage.store import manifest_path
from lmq_tasks.engine import stage_task
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
    stage_task.cache_clear()


def a_graph(store, layers, stage=ALONE, variant=None, **config):
    """Layers that do not depend on each other, or each on the one before."""
    graph, site, before = Graph(), Site(store_url=str(store)), []
    for layer in range(layers):
        inputs = {"before": before[-1]} if before and stage is CHAIN else {}
        before.append(
            graph.add(
                stage, "m", "", site, layer=layer, config={"layer": layer, **config}, inputs=inputs, variant=variant
            )
        )
    return graph


def chunk_sizes(graph, seconds, workers):
    """Sizes of the chunks when each is taken for done at once, `seconds` for each of its nodes; nothing is run."""
    walk = Walk(graph, lambda *_: None, in_flight=workers, chunk_seconds=20.0, find=lambda *_: None)
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
        (CHAIN, 29, 1.0, 2, [1, 20, 8]),
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
        graph.add(ALONE, "n", "", Site(store_url=str(tmp_path), model=other), layer=layer, config={"layer": layer})
        graph.add(CHAIN, "m", "", Site(store_url=str(tmp_path)), layer=layer, config={"layer": layer})
    assert chunk_sizes(graph, 0.5, 1) == [1, 3, 1, 1, 3, 3]


def walk(graph, elsewhere=False, outcomes=None):
    """Walk a graph in chunks on threads; the flow's state, and label → state of every outcome that was watched.

    `outcomes` is filled with label → outcome.
    """
    watched = []

    @flow(name="walk", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=2))
    def chunked():
        watch = lambda *seen: watched.append(seen)  # noqa: E731
        return execute(graph, in_flight=2, watch=watch, chunk_seconds=20.0, elsewhere=elsewhere)

    state = chunked(return_state=True)
    found = [(node.label, outcome) for node, outcome in watched if outcome is not None]
    assert len(dict(found)) == len(found), "a node ended twice"
    (outcomes if outcomes is not None else {}).update(found)
    return state, {label: outcome.state for label, outcome in found}


def rows(state):
    """Name → state of every task run of a flow run."""
    return {task.name: task.state_name for task in recorded_tasks(state.state_details.flow_run_id)}


def values(store, stage):
    manifests = list(ArtifactStore(str(store)).manifests(stage))
    paths = [ArtifactStore(str(store)).path(manifest.ref, "value.json") for manifest in manifests]
    return sorted(json.loads(path.read_text()) for path in paths)


def test_what_waits_for_a_node_starts_while_the_chunk_of_that_node_goes_on(server, tmp_path, monkeypatch):
    after_its_parent = threading.Event()

    def wait_for_the_side(job):
        if job.config["layer"] == 3:
            assert after_its_parent.wait(60)
        work(job)

    def note_start(job):
        after_its_parent.set()
        work(job)

    monkeypatch.setitem(lmq_tasks.STAGES, "chain", Stage("chain", 1, "t/1", wait_for_the_side))
    monkeypatch.setitem(lmq_tasks.STAGES, "alone", Stage("alone", 1, "t/1", note_start))
    stage_task.cache_clear()
    graph = a_graph(tmp_path, 4, CHAIN)
    second = next(node for node in graph if node.layer == 1)
    graph.add(ALONE, "m", "", second.site, layer=9, config={"layer": 9}, inputs={"before": second})
    state, seen = walk(graph)
    assert set(seen.values()) == {"ran"}
    assert set(rows(state)) == {"chain · layer 0", "chain · layers 1-3", "alone · layer 9"}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_chain_is_carried_by_few_tasks_and_every_node_keeps_its_artifact(server, tmp_path, elsewhere):
    state, seen = walk(a_graph(tmp_path, 6, CHAIN), elsewhere)
    assert state.is_completed()
    assert seen == {f"m layer {layer}": "ran" for layer in range(6)}
    assert values(tmp_path, "chain") == [list(range(length)) for length in range(1, 7)]
    assert rows(state) == {"chain · layer 0": "Completed", "chain · layers 1-5": "Completed"}


def test_what_is_there_already_is_one_cached_task(server, tmp_path):
    walk(a_graph(tmp_path, 6, CHAIN))
    state, seen = walk(a_graph(tmp_path, 6, CHAIN))
    assert set(seen.values()) == {"cached"}
    (task,) = recorded_tasks(state.state_details.flow_run_id)
    assert (task.name, task.state_name) == ("chain · layers 0-5", "Cached")
    assert task.state.message == "6 of 6 layers cached"


def test_a_list_at_the_address_of_an_earlier_result_is_not_taken_for_it(server, tmp_path):
    @flow(name="walk", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=2))
    def after_many_results():
        freed = [[] for _ in range(100_000)]
        stale = Completed(state_details={"task_run_id": uuid4(), "flow_run_id": uuid4()})
        FlowRunContext.get().run_results.update({id(item): (stale, RunType.TASK_RUN, None) for item in freed})
        del freed
        execute(a_graph(tmp_path, 3), in_flight=2, watch=lambda *_: None, chunk_seconds=20.0)

    state = after_many_results(return_state=True)
    assert [task.task_inputs["items"] for task in recorded_tasks(state.state_details.flow_run_id)] == [[], [], []]


def test_tasks_know_the_tasks_that_they_take_their_inputs_from(server, tmp_path):
    walk(a_graph(tmp_path, 2, CHAIN))
    graph = a_graph(tmp_path, 3, CHAIN)
    last = graph.add(ALONE, "m", "end", graph.nodes[0].site, config={"layer": 9}, inputs={"before": graph.nodes[-1]})
    state, seen = walk(graph)
    assert seen[last.label] == "ran"
    tasks = {task.name: task for task in recorded_tasks(state.state_details.flow_run_id)}
    inputs = {name: [item.id for item in task.task_inputs["items"]] for name, task in tasks.items()}
    assert inputs == {
        "chain · layers 0-1": [],
        "chain · layer 2": [tasks["chain · layers 0-1"].id],
        "alone · end": [tasks["chain · layer 2"].id],
    }


def test_what_was_made_before_is_not_made_again_beside_what_is_new(server, tmp_path):
    walk(a_graph(tmp_path, 3))
    state, seen = walk(a_graph(tmp_path, 6))
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["cached"] * 3 + ["ran"] * 3
    assert rows(state)["alone · layers 0-2"] == "Cached"


def test_what_follows_a_node_that_gives_the_same_bytes_again_is_found_inside_a_chunk(server, tmp_path):
    walk(a_graph(tmp_path, 4, CHAIN))
    store = ArtifactStore(str(tmp_path))
    for manifest in store.manifests("chain"):
        if manifest.config["layer"] in (0, 1):
            store.storage.remove(manifest_path("chain", manifest.key))
    _, seen = walk(a_graph(tmp_path, 4, CHAIN))
    assert [seen[f"m layer {layer}"] for layer in range(4)] == ["ran", "ran", "cached", "cached"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_failed_node_leaves_the_others_of_its_chunk_alone(server, tmp_path, elsewhere):
    state, seen = walk(a_graph(tmp_path, 5, variant="v", how="failed", wrong=[3]), elsewhere)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
    assert [name for name, shown in rows(state).items() if shown == "Failed"] == ["alone · layers 2-4"]
    graph = a_graph(tmp_path, 6, CHAIN, variant="v", how="bad", wrong=[3])
    _, seen = walk(graph, elsewhere)
    assert [seen[f"m layer {layer}"] for layer in range(6)] == ["ran", "ran", "ran", "failed", "not run", "not run"]


@pytest.mark.parametrize(("how", "error"), [("bad", InputError), ("damaged", DamagedInput)])
def test_what_ends_a_walk_is_raised_from_inside_a_chunk(server, tmp_path, how, error):
    state, _ = walk(a_graph(tmp_path, 4, how=how, wrong=[2]))
    assert isinstance(state.result(raise_on_failure=False), error)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_chunk_that_could_not_reach_its_store_is_tried_again_without_its_finished_nodes(
    server, tmp_path, monkeypatch, elsewhere
):
    made = []

    def work_unreliably(job):
        if job.config["layer"] == 3 and made.count(3) == 0:
            made.append(3)
            raise ConnectionResetError("the store hung up")
        made.append(job.config["layer"])
        work(job)

    monkeypatch.setitem(lmq_tasks.STAGES, "alone", Stage("alone", 1, "t/1", work_unreliably))
    stage_task.cache_clear()
    at_once = stage_task("alone").with_options(retry_delay_seconds=0)
    monkeypatch.setattr(walk_module, "stage_task", lambda name: at_once)
    state, seen = walk(a_graph(tmp_path, 5), elsewhere)
    assert state.is_completed()
    assert set(seen.values()) == {"ran"}
    assert sorted(made) == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_nodes_of_a_lost_chunk_are_tried_one_by_one(server, tmp_path, monkeypatch, elsewhere):
    """As when one layer needs more memory than its worker has, which takes the whole chunk with it."""
    whole = stage_task("alone")

    def out_of_memory(label, items, total, tell=None):
        if any(item.get("config", {}).get("layer") == 3 for item in items):
            return Crashed(message="out of memory")
        return whole.fn(label, items, total, tell)

    carrier = task(out_of_memory, name="alone", task_run_name="{label}", persist_result=False)
    monkeypatch.setattr(walk_module, "stage_task", lambda name: carrier)
    outcomes = {}
    _, seen = walk(a_graph(tmp_path, 5, variant="v"), elsewhere, outcomes)
    assert [seen[f"m layer {layer}"] for layer in range(5)] == ["ran", "ran", "ran", "failed", "ran"]
    assert outcomes["m layer 3"].error == "m layer 3: its worker was lost (Crashed: out of memory)"


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("layers", [1, 5])
def test_what_a_task_made_is_found_where_its_state_came_back_without_data(
    server, tmp_path, monkeypatch, elsewhere, layers
):
    """As when a server that was told of the end twice answers with a state of its own."""
    whole, told = stage_task("alone"), []

    def answered_by_the_server(label, items, total, tell=None):
        found = whole.fn(label, items, total, tell)
        told.append(label)
        return Completed() if len(told) == 1 else found

    carrier = task(answered_by_the_server, name="alone", task_run_name="{label}", persist_result=False)
    monkeypatch.setattr(walk_module, "stage_task", lambda name: carrier)
    outcomes = {}
    state, seen = walk(a_graph(tmp_path, layers, variant="v"), elsewhere, outcomes)
    assert state.is_completed()
    assert len(seen) == layers
    assert set(seen.values()) <= {"ran", "cached"}
    assert all(outcome.ref is not None for outcome in outcomes.values())


def test_a_walk_that_is_broken_off_ends_its_chunks_after_the_node_under_work(server, tmp_path, monkeypatch):
    def work_slowly(job):
        time.sleep(0.05)
        work(job)

    monkeypatch.setitem(lmq_tasks.STAGES, "chain", Stage("chain", 1, "t/1", work_slowly))
    stage_task.cache_clear()

    def break_off(node, outcome):
        if node.layer == 1:
            raise KeyError("broken off")

    @flow(name="broken", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=2))
    def broken():
        execute(a_graph(tmp_path, 40, CHAIN), in_flight=2, watch=break_off, chunk_seconds=20.0)

    state = broken(return_state=True)
    assert isinstance(state.result(raise_on_failure=False), KeyError)
    assert 1 <= len(values(tmp_path, "chain")) < 10
