"""Progress of a run: which stage, how far, how long still; of what was cached, and why the rest ran."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.explain import PlannedNode
from lmq_flows.graph.node import Node
from lmq_tasks.stage import open_store, shares_under_way

_LINE_EVERY_SECONDS = 10.0
_MOVE_EVERY_SECONDS = 1.0
_FOLLOWS = "follows "


class Reporter(Protocol):
    """Shows the progress of stages somewhere."""

    def show(self, stage: str, progress: StageProgress) -> None:
        """One node of `stage` started or ended."""
        ...


@dataclass
class StageProgress:
    """How far one stage is."""

    total: int
    ran: int = 0
    cached: int = 0
    failed: int = 0
    not_run: int = 0
    """Of the failed ones, those whose inputs are missing."""
    at_work: set[Node] = field(default_factory=set)
    """Nodes that started and did not end yet."""
    worked_s: float = 0.0
    """Seconds, up to `since_s`, that any of them was at work."""
    since_s: float | None = None
    """Since when one is at work; None while none is."""
    made_s: float = 0.0
    """Seconds that the nodes that ran took, added up."""
    size_bytes: int = 0
    """Bytes of the artifacts of nodes that are done."""
    reason: str = ""
    """Why a node has to run, of the first that has to."""
    error: str = ""
    """Message of the first node that failed."""

    @property
    def done(self) -> int:
        """Nodes that will not run any more."""
        return self.ran + self.cached + self.failed

    @property
    def elapsed_s(self) -> float:
        """Seconds that nodes were at work: a stage that waits for others does not grow older."""
        return self.worked_s + (0.0 if self.since_s is None else time.monotonic() - self.since_s)

    def start(self, node: Node) -> None:
        """Note that a node is at work."""
        self.at_work.add(node)
        if self.since_s is None:
            self.since_s = time.monotonic()

    def end(self, node: Node) -> None:
        """Note that a node is at work no more, if it was."""
        self.at_work.discard(node)
        if not self.at_work:
            self.worked_s, self.since_s = self.elapsed_s, None

    @property
    def remaining_s(self) -> float | None:
        """Seconds still to go at the pace of the nodes that ran; None before the first has."""
        return self.remaining_after(0.0)

    def remaining_after(self, under_way: float) -> float | None:
        """The same where parts of further nodes are done that add up to `under_way`; None before anything is."""
        made = self.ran + under_way
        return self.elapsed_s / made * (self.total - self.done - under_way) if made else None


@dataclass
class RunProgress:
    """Counts what happens to the nodes of a graph, stage by stage, and tells the reporters."""

    reporters: list[Reporter]
    stages: dict[str, StageProgress] = field(default_factory=dict)

    def expect(self, nodes: Iterable[Node]) -> None:
        """Add nodes, as those of a graph, to what is to be done."""
        for name, total in Counter(node.stage.name for node in nodes).items():
            self.stages.setdefault(name, StageProgress(0)).total += total

    def explain(self, planned: Sequence[PlannedNode]) -> None:
        """Add planned nodes to what is to be done, and why: of a stage that only follows another, which one."""
        self.expect(item.node for item in planned)
        to_run = {item.node for item in planned if not item.cached}
        for item in planned:
            stage = self.stages[item.node.stage.name]
            if item.cached or (stage.reason and not stage.reason.startswith(_FOLLOWS)):
                continue
            before = next((parent.stage.name for parent in item.node.parents if parent in to_run), None)
            if before is None:
                stage.reason = item.reason
            elif before != item.node.stage.name:
                stage.reason = stage.reason or f"{_FOLLOWS}{before}"

    def watch(self, node: Node, outcome: Outcome | None) -> None:
        """Take note of a node that starts (outcome None) or ends."""
        stage = self.stages[node.stage.name]
        if outcome is None:
            stage.start(node)
        else:
            stage.end(node)
            stage.ran += outcome.state == "ran"
            stage.cached += outcome.state == "cached"
            stage.failed += outcome.state in ("failed", "not run")
            stage.not_run += outcome.state == "not run"
            if outcome.state == "failed":
                stage.error = stage.error or outcome.error or ""
            if outcome.ref is not None:
                manifest = open_store(node.site.store_url).manifest(outcome.ref.stage, outcome.ref.key)
                stage.size_bytes += manifest.size_bytes if manifest else 0
                stage.made_s += (manifest.seconds or 0.0) if manifest and outcome.state == "ran" else 0.0
        for reporter in self.reporters:
            reporter.show(node.stage.name, stage)


class TerminalReporter:
    """Bars on a terminal; elsewhere a line when a stage ends, and every 10 seconds for those at work.

    Stages that count say how far their layers or variants are, where these are made in this process.
    """

    def __init__(self, console: Console):
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._under_way: dict[str, StageProgress] = {}
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TerminalReporter:
        if self._console.is_terminal:
            self._progress.start()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stop.set()

    def show(self, stage: str, progress: StageProgress) -> None:
        """Update the stage's bar, or print a line when it is done."""
        if progress.done < progress.total:
            self._under_way[stage] = progress
        else:
            self._under_way.pop(stage, None)
        if self._console.is_terminal:
            self._move_bar(stage, progress)
        elif progress.done == progress.total:
            self._print(stage, progress, f"in {progress.elapsed_s:.1f} s")

    def _move_bar(self, stage: str, progress: StageProgress) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=progress.total, note="")
        done = progress.done + sum(shares_under_way(stage))
        self._progress.update(self._bars[stage], completed=done, total=progress.total, note=_note(progress))

    def _beat(self) -> None:
        while not self._stop.wait(_MOVE_EVERY_SECONDS if self._console.is_terminal else _LINE_EVERY_SECONDS):
            for stage, progress in list(self._under_way.items()):
                if self._console.is_terminal:
                    self._move_bar(stage, progress)
                if self._console.is_terminal or not progress.at_work:
                    continue
                shares = shares_under_way(stage)
                left = progress.remaining_after(sum(shares))
                counted = " and ".join(f"{share:.0%}" for share in shares if share)
                more = f" and {counted} of the next," if counted else ""
                rest = "" if left is None else f", about {left:.0f} s left"
                self._print(stage, progress, f"{more} after {progress.elapsed_s:.0f} s{rest}".strip())

    def _print(self, stage: str, progress: StageProgress, text: str) -> None:
        note = f" ({_note(progress)})" if _note(progress) else ""
        self._console.print(f"{stage:<18} {progress.done}/{progress.total} {text}{note}", highlight=False)


def _note(progress: StageProgress) -> str:
    notes = [f"{progress.cached} cached"] if progress.cached else []
    return ", ".join([*notes, f"{progress.failed} failed"] if progress.failed else notes)
