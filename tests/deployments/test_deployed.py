"""What is deployed, run by a real worker: on demand, refused, cancelled, by a schedule, announced."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling

from lmq.report.results import read_results
from lmq_flows.serve.deploy import deployments_dir
from lmq_storage import ArtifactStore
from lmq_storage.processes import is_alive
from lmq_storage.verify import verify
from tests.deployments.conftest import Server, wait_for
from tests.flows.conftest import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = {
    "calibration": {"sequences": 3, "sequence_length": 32},
    "evaluation": {"tokens": 256, "window": 64, "stride": 32},
}


def request_of(model: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {"model": name, "source": str(model), "strategy": "uniform", "budget": "uniform b4g64", **SMALL, **changes}


def start(server: Server, request: dict[str, Any]) -> Any:
    with server.client() as client:
        deployment = client.read_deployment_by_name("lmq-quantize/on-demand")
        return client.create_flow_run_from_deployment(deployment.id, parameters={"request": request})


def look(server: Server, flow_run_id: Any) -> Any:
    with server.client() as client:
        return client.read_flow_run(flow_run_id)


def test_a_model_is_quantized_on_demand(prefect: Server, tiny_llama: Path) -> None:
    request = json.dumps(request_of(tiny_llama, "asked"))
    done = prefect.prefect("deployment", "run", "lmq-quantize/on-demand", "-p", f"request={request}", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(prefect.home / "runs" / "asked-uniform-uniform-b4g64" / "results.json")
    assert [result.strategy for result in results] == ["full-precision", "uniform"]
    assert all(result.perplexity for result in results)
    with prefect.client() as client:
        names = {run.name for run in client.read_flow_runs()}
    assert "quantize asked uniform uniform b4g64" in names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "four"}, "four"),
        ({"menu": ["b5g64"]}, "b5g64"),
        ({"strategy": "magic"}, "magic"),
        ({"evaluation": {"tokens": -1}}, "-1"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_values_are_refused_when_they_are_submitted(
    prefect: Server, tiny_llama: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        start(prefect, request_of(tiny_llama, "refused", **changes))
    assert refused.value.response.status_code == 409
    assert said in refused.value.response.text


def test_cancelling_ends_native_work_of_the_worker(prefect: Server, wide: Path) -> None:
    run = start(prefect, request_of(wide, "wide", budget="uniform b3g64"))

    def in_native_work() -> Any:
        with prefect.client() as client:
            tasks = client.read_task_runs(limit=200)
        busy = any(task.state_name == "Running" and task.name.startswith("grids ") for task in tasks)
        return busy and look(prefect, run.id).labels.get("lmq.process")

    process = wait_for(in_native_work, 400)
    assert is_alive(process)
    with prefect.client() as client:
        client.set_flow_run_state(run.id, Cancelling())
    asked_s = time.monotonic()
    wait_for(lambda: not is_alive(process), 120)
    sys.stdout.write(f"the process was gone {time.monotonic() - asked_s:.1f} s after cancelling\n")
    wait_for(lambda: look(prefect, run.id).state.name == "Cancelled", 60)
    store = ArtifactStore(str(prefect.home / "store"))
    assert verify(store) == []


def test_a_schedule_yields_runs_and_one_of_them_runs(prefect: Server, tiny_llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_llama, tmp_path, name="scheduled", strategies=["uniform"], measure__menu=["b4g64"])
    path = tmp_path / "scheduled.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with prefect.client() as client:
        deployment = client.read_deployment_by_name("lmq-sweep/nightly")
        wanted = DeploymentFilter(name=DeploymentFilterName(any_=["nightly"]))
        scheduled = wait_for(lambda: client.read_flow_runs(deployment_filter=wanted), 120)
        assert {run.state.name for run in scheduled} == {"Scheduled"}
        assert {(run.next_scheduled_start_time.hour, run.next_scheduled_start_time.minute) for run in scheduled} == {
            (2, 0)
        }
        every_minute = CronSchedule(cron="* * * * *", timezone="UTC")
        client.create_deployment_schedules(deployment.id, [(every_minute, True)])
        parameters = {"preset": str(path), "store": config.store, "runs_dir": config.runs_dir}
        client._client.patch(f"/deployments/{deployment.id}", json={"parameters": parameters}).raise_for_status()
        ours = wait_for(
            lambda: [run for run in client.read_flow_runs(deployment_filter=wanted) if run.state.name == "Completed"],
            400,
        )
        client._client.patch(f"/deployments/{deployment.id}", json={"paused": True}).raise_for_status()
    assert ours[0].auto_scheduled
    assert ours[0].name == "quantize tiny uniform uniform b4g64"
    assert (config.run_dir / "results.json").is_file()


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """A server that takes notifications: its address and what it was told."""
    messages: list[str] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", messages
        server.shutdown()


def test_the_end_of_a_run_is_announced(prefect: Server, tiny_llama: Path, tmp_path: Path, told: Any) -> None:
    address, messages = told
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    with prefect.client():
        block = CustomWebhookNotificationBlock(
            name="test", url=address, json_data={"subject": "{{subject}}", "body": "{{body}}"}
        )
        block_id = block.save("lmq-test", overwrite=True)
    text = (deployments_dir() / "automations.yaml").read_text().replace("NOTIFICATION_BLOCK_ID", str(block_id))
    (tmp_path / "automations.yaml").write_text(text)
    made = prefect.prefect("automation", "create", "--from-file", str(tmp_path / "automations.yaml"))
    assert made.returncode == 0, made.stdout + made.stderr
    time.sleep(5)  # the server looks for new automations now and then
    start(prefect, request_of(tiny_llama, "good"))
    start(prefect, request_of(tmp_path / "lost", "lost"))
    wait_for(lambda: len(messages) >= 2, 300)
    found = sorted(json.loads(message)["subject"] for message in messages)
    assert found == [
        "lmq: quantize good uniform uniform b4g64: Completed",
        "lmq: quantize lost uniform uniform b4g64: Failed",
    ]
    assert any("there is no model directory" in message for message in messages)
