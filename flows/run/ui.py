"""What a person who only watches the Prefect UI sees of a finished run: the table, the pictures, the links."""

from __future__ import annotations

import base64
import platform
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_table_artifact,
)

from lmq.report.results import read_results
from lmq.report.results_table import results_table
from lmq_flows.config.names import slug
from lmq_tasks.report import FIGURES_FOLDER


def publish_results(run_dir: Path) -> None:
    """Put the run's table, pictures and report as artifacts on the flow run."""
    key = artifact_key(run_dir.name)
    headers, rows = results_table(read_results(run_dir / "results.json"))
    create_table_artifact(
        key=f"{key}-results", table=[dict(zip(headers, row, strict=True)) for row in rows], description="Variants"
    )
    create_link_artifact(key=f"{key}-report", link=(run_dir / "report.html").absolute().as_uri(), link_text="Report")
    for picture in sorted((run_dir / FIGURES_FOLDER).glob("*.svg")):
        data = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(
            key=f"{key}-{artifact_key(picture.stem)}",
            image_url=f"data:image/svg+xml;base64,{data}",
            description=picture.stem,
        )


def summary(run_dir: Path) -> str:
    """The end of a run in Markdown: the table, what could not be made and why, and where everything lies."""
    results = read_results(run_dir / "results.json")
    parts = ["## Results", (run_dir / "summary.md").read_text().strip()]
    failed = [f"- **{result.model} {result.label}**: {result.error}" for result in results if result.error]
    if failed:
        parts += ["## Not made", "\n".join(failed)]
    files = [_link(run_dir / name) for name in ("report.html", "results.json", "config.yaml")]
    files += [_link(run_dir / result.checkpoint) for result in results if result.checkpoint]
    return "\n\n".join([*parts, f"## Files on {platform.node()}", "\n".join(files)]) + "\n"


def _link(path: Path) -> str:
    """A line with the path as text too: browsers follow no link from a page of a server to a file."""
    return f"- [{path.name}]({path.absolute().as_uri()}) `{path.absolute()}`"


def artifact_key(text: str) -> str:
    """A text as a key of an artifact, which holds lower-case letters, digits and dashes only."""
    return slug(text).replace(".", "-").replace("_", "-")
