import pytest

from lmq_flows.config.names import slug
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.explain import plan_graph
from lmq_flows.graph.node import FileOf, Graph, resolve_inputs
from lmq_storage import ArtifactStore
from lmq_tasks.stage import Site, Stage


def write_value(job):
    (job.output / "value.txt").write_text(str(job.config["value"]))
    (job.output / "other.txt").write_text("always the same")


def read_value(job):
    (job.output / "value.txt").write_text(job.input("source", "value.txt").read_text() + "!")


def read_other(job):
    (job.output / "value.txt").write_text(job.input("source", "other.txt").read_text())


READ = Stage("read", 1, "t/1", read_value)


def two_step_graph(store, value, version=1):
    site = Site(store_url=str(store))
    graph = Graph()
    make = graph.add(Stage("make", version, "t/1", write_value), "x", "", site, config={"value": value})
    read = graph.add(READ, "x", "", site, inputs={"source": make})
    graph.add(Stage("other", 1, "t/1", read_other), "x", "", site, inputs={"source": FileOf(make, "other.txt")})
    return graph, make, read


def test_chain_that_waits_is_the_depth_of_a_node(tmp_path):
    graph, make, read = two_step_graph(tmp_path, 1)
    depth = graph.depth_below()
    assert (depth[make], depth[read]) == (2, 1)
    assert graph.children()[make] == graph.nodes[1:]


def test_inputs_are_resolved_by_name_and_file(tmp_path):
    graph, make, _ = two_step_graph(tmp_path, 1)
    assert resolve_inputs(graph.nodes[2], {make: {"uri": "u"}}) == {
        "source": {"artifact": {"uri": "u"}, "file": "other.txt"}
    }


def test_only_the_file_that_is_read_decides(tmp_path):
    execute_directly(two_step_graph(tmp_path, 1)[0])
    graph = two_step_graph(tmp_path, 2)[0]
    execute_directly(graph)
    made = [manifest.stage for manifest in ArtifactStore(str(tmp_path)).manifests()]
    assert sorted(made) == ["make", "make", "other", "read", "read"]


@pytest.mark.parametrize(
    ("value", "version", "reasons"),
    [
        (1, 1, ["cached", "cached", "cached"]),
        (2, 1, ["value: 1 → 2", "its input make x will be made", "its input make x will be made"]),
        (1, 2, ["algorithm version 1 → 2", "its input make x will be made", "its input make x will be made"]),
    ],
)
def test_plan_gives_the_reason(tmp_path, value, version, reasons):
    execute_directly(two_step_graph(tmp_path, 1)[0])
    assert [item.reason for item in plan_graph(two_step_graph(tmp_path, value, version)[0])] == reasons


def test_plan_says_never_made_and_damaged(tmp_path):
    graph, make, _ = two_step_graph(tmp_path, 1)
    assert next(item.reason for item in plan_graph(graph)) == "never made"
    store = ArtifactStore(str(tmp_path))
    store.path(execute_directly(graph)[make], "value.txt").unlink()
    assert next(item.reason for item in plan_graph(graph)) == "its artifact is damaged"


def test_slug_is_fit_for_a_file_name():
    assert slug("SmolLM2 sensi-boost top_m=1 @ uniform b4g64 + 2%") == "smollm2-sensi-boost-top-m-1-uniform-b4g64-2"
