import io
import time

import pytest
from rich.console import Console

from lmq_flows.graph import progress as progress_module
from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.node import Graph
from lmq_flows.graph.progress import RunProgress, StageProgress, TerminalReporter
from lmq_tasks.stage import Site, Stage


@pytest.fixture
def graph():
    graph = Graph()
    for layer in range(4):
        graph.add(Stage("forward", 1, "t/1", lambda job: None), "", "", Site(store_url="s"), layer=layer)
    return graph


def test_time_left_follows_the_pace_of_what_ran(graph, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = RunProgress([])
    progress.expect(graph)
    nodes = list(graph)
    progress.watch(nodes[0], None)
    stage = progress.stages["forward"]
    assert stage.remaining_s is None
    now = 10.0
    progress.watch(nodes[0], Outcome("ran"))
    assert (stage.done, stage.ran, stage.total) == (1, 1, 4)
    assert stage.remaining_s == pytest.approx(3 * 10.0)


def test_a_stage_that_waits_for_others_does_not_grow_older(graph, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = RunProgress([])
    progress.expect(graph)
    nodes, stage = list(graph), progress.stages["forward"]
    for moment, node, outcome in (
        (0.0, nodes[0], None),
        (4.0, nodes[1], None),
        (10.0, nodes[0], Outcome("ran")),
        (12.0, nodes[1], Outcome("ran")),
        (100.0, nodes[2], None),
        (100.0, nodes[2], None),  # it was lost, and is tried again
    ):
        clock[0] = moment
        progress.watch(node, outcome)
    assert stage.elapsed_s == 12.0
    clock[0] = 103.0
    assert stage.elapsed_s == 15.0
    progress.watch(nodes[2], Outcome("ran"))
    progress.watch(nodes[3], Outcome("not run"))
    clock[0] = 500.0
    assert stage.elapsed_s == 15.0


def test_lines_say_stage_count_and_what_was_cached(graph):
    stream = io.StringIO()
    with TerminalReporter(Console(file=stream, width=100)) as terminal:
        progress = RunProgress([terminal])
        progress.expect(graph)
        for node, state in zip(graph, ["cached", "ran", "failed", "not run"], strict=True):
            progress.watch(node, None)
            progress.watch(node, Outcome(state))
    text = stream.getvalue()
    assert "forward" in text
    assert "4/4" in text
    assert "1 cached, 2 failed" in text


def test_lines_say_how_far_the_next_are(graph, monkeypatch):
    monkeypatch.setattr(progress_module, "_LINE_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(progress_module, "shares_under_way", lambda stage: [0.5, 0.25, 0.0])
    stream = io.StringIO()
    with TerminalReporter(Console(file=stream, width=100)) as terminal:
        progress = RunProgress([terminal])
        progress.expect(graph)
        first = next(iter(graph))
        progress.watch(first, None)
        progress.watch(first, Outcome("ran"))
        progress.watch(list(graph)[1], None)
        deadline = time.monotonic() + 30
        while "\n" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    line = stream.getvalue().splitlines()[0]
    assert line.startswith("forward            1/4 and 50% and 25% of the next, after ")
    assert line.endswith(" s left")


def test_time_left_counts_what_is_under_way():
    stage = StageProgress(6, ran=2, worked_s=50.0)
    assert stage.remaining_after(0.5) == pytest.approx(50.0 / 2.5 * 3.5)
    assert StageProgress(6, worked_s=50.0).remaining_after(0.5) == pytest.approx(50.0 / 0.5 * 5.5)


def test_stage_that_never_started_took_no_time():
    assert StageProgress(3).elapsed_s == 0.0
