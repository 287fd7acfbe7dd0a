"""What a person who only watches the Prefect UI sees of a finished run: the table, the pictures, the links."""

from __future__ import annotations

import base64
from pathlib import Path

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from lmq.results import read_results, results_table
from lmq_flows.names import slug
from lmq_tasks.reporting import FIGURES_FOLDER


def publish_results(run_dir: Path) -> None:
    """Put the run's table, pictures and report as artifacts on the flow run."""
    key = _key(run_dir.name)
    headers, rows = results_table(read_results(run_dir / "results.json"))
    create_table_artifact(
        key=f"{key}-results", table=[dict(zip(headers, row, strict=True)) for row in rows], description="Variants"
    )
    create_markdown_artifact(key=f"{key}-summary", markdown=(run_dir / "summary.md").read_text(), description="Summary")
    create_link_artifact(key=f"{key}-report", link=(run_dir / "report.html").absolute().as_uri(), link_text="Report")
    for picture in sorted((run_dir / FIGURES_FOLDER).glob("*.svg")):
        data = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(
            key=f"{key}-{_key(picture.stem)}", image_url=f"data:image/svg+xml;base64,{data}", description=picture.stem
        )


def _key(text: str) -> str:
    """Artifact keys hold lower-case letters, digits and dashes only."""
    return slug(text).replace(".", "-").replace("_", "-")
