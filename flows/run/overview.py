"""The run in one table: which stages there are, what was cached, what ran and why, how long still.

One Markdown artifact of Prefect, updated in place, and the same table on the terminal at the end.
"""

from __future__ import annotations

import base64
import logging
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from rich.console import Console
from rich.table import Table

from lmq.report.results import format_bytes, read_results
from lmq.report.results_table import markdown_rows
from lmq_flows.config.names import slug
from lmq_flows.graph.progress import StageProgress
from lmq_tasks.report import FIGURES_FOLDER

_log = logging.getLogger(__name__)

_HEADERS = ("Stage", "State", "Done", "Seconds", "Bytes", "Why")
_TEXTS = ("Model", "Stage", "State", "Why")
_SIGNS = {"waiting": "·", "running": "▶", "cached": "✓", "ran": "✓", "failed": "✗", "not run": "✗", "stopped": "✗"}
_LONGEST_REASON = 100
_WIDTH = 140


class Overview:
    """Follows the stages of a run, model by model, and shows them as an artifact of the flow run that it began in."""

    def __init__(self, name: str, key: str) -> None:
        self._name = name
        self._key = key
        self._stages: dict[tuple[str, str], StageProgress] = {}
        self._started_s = time.monotonic()
        self._end: str | None = None
        self._results = ""
        self._artifact: UUID | None = None
        self._changed = True
        self._publishing = threading.Lock()

    def follow(self, model: str, stages: Mapping[str, StageProgress]) -> None:
        """Add stages that are to be done; those of a walk that begins anew take the place of the earlier ones."""
        self._stages = self._stages | {(model, name): progress for name, progress in stages.items()}
        self._changed = True

    def show(self, stage: str, progress: StageProgress) -> None:
        """A node of a stage started or ended."""
        self._changed = True

    def finish(self, end: str, results: str = "") -> None:
        """Say how the run ended, with its results in Markdown."""
        self._end, self._results = end, results
        self._changed = True
        self.publish()

    @property
    def headline(self) -> str:
        """`6 of 15 stages done, 4 of them cached; now evaluate (about 40 s left)`."""
        states = [self._state(progress) for progress in self._stages.values()]
        cached, done = (
            states.count("cached"),
            sum(progress.done == progress.total for progress in self._stages.values()),
        )
        text = f"{done} of {len(states)} stages done" + (f", {cached} of them cached" if cached else "")
        failed = states.count("failed")
        text += f", {failed} with failures" if failed else ""
        under_way = [
            name + ("" if progress.remaining_s is None else f" (about {progress.remaining_s:.0f} s left)")
            for (_, name), progress in self._stages.items()
            if self._state(progress) == "running"
        ]
        return f"{text}; now {', '.join(under_way)}" if under_way else text

    @property
    def markdown(self) -> str:
        """The whole artifact."""
        state = f"{self._end or 'Running'} after {time.monotonic() - self._started_s:.0f} s"
        headers, rows = self._table()
        numbers = [[*row[:-1], row[-1].replace("_", "\\_")] for row in rows]
        table = markdown_rows(headers, numbers, texts=_TEXTS) if rows else ""
        at = datetime.now(UTC).strftime("%H:%M:%S UTC")
        return f"# {self._name}\n\n**{state}** ({at}): {self.headline}\n\n{table}\n{self._results}"

    def table(self) -> Table:
        """The stages, for the terminal."""
        headers, rows = self._table()
        table = Table(title=f"{self._name}: {self.headline}", title_justify="left")
        for header in headers:
            table.add_column(header, justify="left" if header in _TEXTS else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def _table(self) -> tuple[list[str], list[list[str]]]:
        several = len({model for model, _ in self._stages if model}) > 1
        rows = [[*([model] if several else []), *self._row(name, it)] for (model, name), it in self._stages.items()]
        return [*(["Model"] if several else []), *_HEADERS], rows

    def _row(self, name: str, progress: StageProgress) -> list[str]:
        state = self._state(progress)
        why = progress.error or ("" if state == "cached" else progress.reason)
        count = f"{progress.ran + progress.cached} of {progress.total}"
        parts = {"failed": progress.failed - progress.not_run, "not run": progress.not_run}
        if progress.cached < progress.total:
            parts = {"cached": progress.cached, **parts}
        return [
            name,
            f"{_SIGNS[state]} {state}",
            ", ".join([count, *(f"{number} {part}" for part, number in parts.items() if number)]),
            f"{progress.made_s:.1f}" if progress.ran else "–",
            format_bytes(progress.size_bytes) if progress.ran or progress.cached else "–",
            why if len(why) <= _LONGEST_REASON else f"{why[: _LONGEST_REASON - 1]}…",
        ]

    def _state(self, progress: StageProgress) -> str:
        if progress.failed:
            return "failed" if progress.failed > progress.not_run else "not run"
        if progress.done == progress.total:
            return "ran" if progress.ran else "cached"
        if not progress.at_work and (self._end is None or not progress.done):
            return "waiting"
        return "running" if self._end is None else "stopped"

    def publish(self) -> None:
        """Make the artifact, or update it where something changed. A server that does not answer stops no run."""
        with self._publishing:
            if not self._changed:
                return
            self._changed = False
            try:
                if self._artifact is None:
                    made = create_markdown_artifact(key=self._key, markdown=self.markdown, description=self.headline)
                    assert isinstance(made, UUID)
                    self._artifact = made
                    get_run_logger().info("stages and results: artifact %r, in the tab Artifacts", self._key)
                    return
                with get_client(sync_client=True) as client:
                    update = ArtifactUpdate(data=self.markdown, description=self.headline)
                    client.update_artifact(self._artifact, update)
            except httpx.HTTPError as error:
                _log.warning("the overview of the run was not updated: %s", error)


_current: ContextVar[Overview | None] = ContextVar("lmq_overview", default=None)
"""That of the run whose flows this thread is in; the flow run of a model is a child of the run's."""


def current_overview() -> Overview | None:
    """The overview of the run that this thread works for; None outside of one."""
    return _current.get()


@contextmanager
def overview_of(name: str, key: str, every_s: float = 2.0) -> Iterator[Overview]:
    """The overview of a run while it is on; at the end, however it ends, its table is printed.

    It is brought up to date by a thread of its own: the walk hands over no work while it waits for a server.
    """
    overview, ended = Overview(name, key), threading.Event()
    overview.publish()

    def keep_up_to_date() -> None:
        while not ended.wait(every_s):
            overview.publish()

    threading.Thread(target=copy_context().run, args=(keep_up_to_date,), daemon=True, name="overview").start()
    token = _current.set(overview)
    try:
        yield overview
    except BaseException as error:
        overview.finish("Interrupted" if isinstance(error, KeyboardInterrupt) else "Failed", f"{error}")
        raise
    finally:
        ended.set()
        _current.reset(token)
        console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
        console.print(overview.table())


def summary(run_dir: Path) -> str:
    """The end of a run in Markdown: the table, what could not be made and why, the figures, where everything lies."""
    results = read_results(run_dir / "results.json")
    parts = ["## Results", (run_dir / "summary.md").read_text().strip()]
    failed = [f"- **{result.model} {result.label}**: {result.error}" for result in results if result.error]
    if failed:
        parts += ["## Not made", "\n".join(failed)]
    pictures = sorted((run_dir / FIGURES_FOLDER).glob("*.svg"))
    if pictures:
        parts += ["## Figures", *map(_picture, pictures)]
    files = [_link(run_dir / name) for name in ("report.html", "results.json", "config.yaml")]
    files += [_link(run_dir / result.checkpoint) for result in results if result.checkpoint]
    return "\n\n".join([*parts, f"## Files on {platform.node()}", "\n".join(files)]) + "\n"


def _picture(path: Path) -> str:
    """An image that needs no server to come from."""
    return f"![{path.stem}](data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()})"


def _link(path: Path) -> str:
    """A line with the path as text too: browsers follow no link from a page of a server to a file."""
    return f"- [{path.name}]({path.absolute().as_uri()}) `{path.absolute()}`"


def artifact_key(text: str) -> str:
    """A text as a key of an artifact, which holds lower-case letters, digits and dashes only."""
    return slug(text).replace(".", "-").replace("_", "-")
