"""The UI in headless Chromium, on a run that found everything in the cache: screenshots are left to be looked at."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)

from tests.deployments.conftest import Server, lmq_run, running
from tests.flows.conftest import tiny_config
from tests.lmq.report.browser import chromium

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1500,1200",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=60000",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(prefect: Server, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The second of two runs and the flow run of its model."""
    place = tmp_path_factory.mktemp("seen")
    config = tiny_config(tiny_llama, place, name="seen", strategies=["uniform", "loss-aware"])
    for _ in range(2):
        with running(lmq_run(config, place), prefect.environment, place / "log") as process:
            assert process.wait(timeout=600) == 0, (place / "log").read_text()
    with prefect.client() as client:
        named = [run for run in client.read_flow_runs() if run.name.startswith("sweep seen")]
        run = max(named, key=lambda item: item.created)
        parent = FlowRunFilterParentFlowRunId(any_=[run.id])
        (of_model,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    return run, of_model


def page(address: str, image: Path, settled: str) -> str:
    """The page once it holds the text `settled`; its picture goes to `image`.

    Virtual time may run out before a busy server has answered, so a page is opened up to six times.
    """
    command = [chromium(), *_FLAGS, f"--user-data-dir={image.parent / 'profile'}", address]
    for _ in range(6):
        dump = subprocess.run([*command, "--dump-dom"], check=True, capture_output=True, text=True, timeout=400)
        if settled in dump.stdout:
            subprocess.run([*command, f"--screenshot={image}"], check=True, capture_output=True, timeout=400)
            return dump.stdout
    raise AssertionError(f"{address} never showed {settled!r}:\n{dump.stdout}")


def test_a_finished_run_shows_models_report_and_artifacts(
    prefect: Server, finished: tuple[Any, Any], tmp_path: Path
) -> None:
    run, _ = finished
    name = "sweep seen: 1 model × 2 strategies × 1 budget"
    shown = page(f"{prefect.address}/runs/flow-run/{run.id}", tmp_path / "run.png", settled="strategy:loss-aware")
    assert name in shown
    assert "<canvas" in shown  # the graph of stages
    assert (tmp_path / "run.png").stat().st_size > 50_000
    page(f"{prefect.address}/artifacts", tmp_path / "artifacts.png", settled="stages done")
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    with prefect.client() as client:
        (summary,) = client.read_artifacts(artifact_filter=of_run)
    shown = page(f"{prefect.address}/artifacts/artifact/{summary.id}", tmp_path / "summary.png", settled="loss-aware")
    assert "uniform" in shown


def test_stages_from_the_cache_are_shown_as_cached(prefect: Server, finished: tuple[Any, Any], tmp_path: Path) -> None:
    _, of_model = finished
    shown = page(f"{prefect.address}/runs/flow-run/{of_model.id}", tmp_path / "model.png", settled=": cached")
    assert "tiny of seen" in shown
    assert "sequence-fisher · layers 0-3" in shown or "evaluate · loss-aware" in shown
