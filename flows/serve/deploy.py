"""What a Prefect server needs to know to run lmq: work pools, deployments, the limit of the GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings

from lmq.errors import LmqError
from lmq_flows.run.prepare import absolute_store_url

CPU_POOL = "lmq-cpu"
GPU_POOL = "lmq-gpu"
_GPU_SLOTS = 1

_QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_CLI_PROMPT": "false"}


def prefect_command(*arguments: str) -> list[str]:
    """The command line of Prefect that belongs to this Python."""
    return [sys.executable, "-m", "prefect", *arguments]


def deployments_dir() -> Path:
    """Folder with prefect.yaml and the templates of work pools: of the checkout, or as installed."""
    checkout = Path(__file__).parents[2] / "deployments"
    return checkout if checkout.is_dir() else Path(__file__).parents[1] / "deployments"


def environment_of(api_url: str, store: str, runs_dir: str) -> dict[str, str]:
    """The environment of Prefect's commands: which server, and where the deployed flows keep what they make."""
    places = {"LMQ_STORE": absolute_store_url(store), "LMQ_RUNS": str(Path(runs_dir).absolute())}
    return {**os.environ, **_QUIET, "PREFECT_API_URL": api_url, **places}


def deploy(environment: Mapping[str, str]) -> None:
    """Create or update pools and deployments on the server. Raises LmqError with what Prefect said."""
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        for pool, slots in ((CPU_POOL, None), (GPU_POOL, _GPU_SLOTS)):
            _ensure_pool(client, pool, slots)
    _run(environment, "--no-prompt", "deploy", "--all", "--prefect-file", str(deployments_dir() / "prefect.yaml"))


def _ensure_pool(client: SyncPrefectClient, name: str, slots: int | None) -> None:
    """Create a pool; one that is there stays as it is, of whatever type (process, docker, kubernetes)."""
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=slots))


def _run(environment: Mapping[str, str], *arguments: str) -> None:
    done = subprocess.run(
        prefect_command(*arguments), env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LmqError(f"prefect {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()}")
