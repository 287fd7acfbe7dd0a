"""The table of a run's stages: what it says at each moment, and that a server which is away stops nothing."""

from __future__ import annotations

import io
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.explain import PlannedNode
from lmq_flows.graph.node import Graph, Node
from lmq_flows.graph.progress import RunProgress
from lmq_flows.run import overview as overview_module
from lmq_flows.run.overview import Overview, current_overview, overview_of
from lmq_tasks.stage import Site, Stage


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the artifact had; it is made once and updated in place."""
    texts: list[str] = []
    identifier = uuid.uuid4()

    class Client:
        def update_artifact(self, artifact: uuid.UUID, update: Any) -> None:
            assert artifact == identifier
            texts.append(update.data)

    @contextmanager
    def client(**_: Any) -> Iterator[Client]:
        yield Client()

    def create(key: str, markdown: str, description: str) -> uuid.UUID:
        assert not texts
        texts.append(markdown)
        return identifier

    monkeypatch.setattr(overview_module, "create_markdown_artifact", create)
    monkeypatch.setattr(overview_module, "get_client", client)
    monkeypatch.setattr(overview_module, "get_run_logger", logging.getLogger)
    return texts


def a_graph(store: Path) -> list[Node]:
    """Two layers of `forward`, `fisher` that needs the second, and `kurtosis` of its own."""
    graph, site = Graph(), Site(store_url=str(store))
    stages = {name: Stage(name, 1, "t/1", lambda job: None) for name in ("forward", "fisher", "kurtosis")}
    first = graph.add(stages["forward"], "m", "", site, layer=0)
    second = graph.add(stages["forward"], "m", "", site, layer=1, inputs={"before": first})
    graph.add(stages["fisher"], "m", "", site, inputs={"states": second})
    graph.add(stages["kurtosis"], "m", "", site)
    return list(graph)


def followed(nodes: list[Node], cached: set[int]) -> tuple[Overview, RunProgress]:
    planned = [
        PlannedNode(node, number in cached, "cached" if number in cached else f"reason {number}", None)
        for number, node in enumerate(nodes)
    ]
    overview = Overview("demo", "demo")
    progress = RunProgress([overview])
    progress.explain(planned)
    overview.follow("m", progress.stages)
    return overview, progress


def rows(text: str) -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines[2:]}


def test_every_stage_says_what_it_does_and_why(shown: list[str], tmp_path: Path) -> None:
    nodes = a_graph(tmp_path)
    overview, progress = followed(nodes, cached={0, 3})
    overview.publish()
    assert rows(shown[-1]) == {
        "forward": ["· waiting", "0 of 2", "–", "–", "reason 1"],
        "fisher": ["· waiting", "0 of 1", "–", "–", "follows forward"],
        "kurtosis": ["· waiting", "0 of 1", "–", "–", ""],
    }
    progress.watch(nodes[0], Outcome("cached"))
    progress.watch(nodes[1], None)
    progress.watch(nodes[3], Outcome("cached"))
    overview.publish()
    assert rows(shown[-1])["forward"][:2] == ["▶ running", "1 of 2, 1 cached"]
    assert rows(shown[-1])["kurtosis"][0] == "✓ cached"
    assert "**Running after 0 s**" in shown[-1]
    assert overview.headline == "1 of 3 stages done, 1 of them cached; now forward"
    progress.watch(nodes[1], Outcome("ran"))
    progress.watch(nodes[2], Outcome("failed", error="no | good"))
    overview.publish()
    assert rows(shown[-1])["forward"][0] == "✓ ran"
    assert rows(shown[-1])["fisher"][:2] == ["✗ failed", "0 of 1, 1 failed"]
    assert "no \\| good" in shown[-1]
    overview.finish("Made 0 of 1 variants", "## Results")
    assert "**Made 0 of 1 variants after 0 s**" in shown[-1]
    assert shown[-1].rstrip().endswith("## Results")
    stream = io.StringIO()
    Console(file=stream, width=120).print(overview.table())
    for words in ("forward", "✓ ran", "✗ failed", "no | good"):
        assert words in stream.getvalue()


def test_only_what_changed_is_sent_to_the_server(shown: list[str], tmp_path: Path) -> None:
    nodes = a_graph(tmp_path)
    overview, progress = followed(nodes, cached=set())
    overview.publish()
    before = len(shown)
    progress.watch(nodes[0], None)
    progress.watch(nodes[0], Outcome("ran"))
    assert len(shown) == before
    overview.publish()
    overview.publish()
    assert len(shown) == before + 1


def test_a_server_that_does_not_answer_holds_nothing_up(shown: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    asked, answer = threading.Event(), threading.Event()
    quick = overview_module.get_client

    @contextmanager
    def slow(**options: Any) -> Iterator[Any]:
        asked.set()
        assert answer.wait(60)
        with quick(**options) as client:
            yield client

    monkeypatch.setattr(overview_module, "get_client", slow)
    nodes = a_graph(tmp_path)
    with overview_of("demo", "demo", every_s=0.01) as overview:
        progress = RunProgress([overview])
        progress.explain([PlannedNode(node, False, "never made", None) for node in nodes])
        overview.follow("m", progress.stages)
        assert asked.wait(60)
        progress.watch(nodes[0], None)
        progress.watch(nodes[0], Outcome("ran"))
        answer.set()
        overview.finish("Made 1 of 1 variants")
    assert "**Made 1 of 1 variants" in shown[-1]
    assert rows(shown[-1])["forward"][1] == "1 of 2"


def test_what_was_under_way_when_a_run_ends_is_stopped(shown: list[str], tmp_path: Path) -> None:
    def interrupted() -> None:
        nodes = a_graph(tmp_path)
        with overview_of("demo", "demo") as overview:
            assert current_overview() is overview
            progress = RunProgress([overview])
            progress.explain([PlannedNode(node, False, "never made", None) for node in nodes])
            overview.follow("m", progress.stages)
            progress.watch(nodes[0], None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert current_overview() is None
    assert "**Interrupted after 0 s**" in shown[-1]
    assert rows(shown[-1])["forward"][0] == "✗ stopped"


def test_a_server_that_is_away_stops_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def away(**_: Any) -> None:
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(overview_module, "create_markdown_artifact", away)
    overview, progress = followed(a_graph(tmp_path), cached=set())
    progress.watch(a_graph(tmp_path)[0], None)
    overview.finish("Made 1 of 1 variants")
