"""The files under deployments/: what they name exists, what they promise of passwords and ports is so."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from prefect import Flow
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from pydantic import ValidationError

from lmq.allocation.budget import Budget
from lmq.errors import InputError
from lmq_flows.config.request import BUDGET_PATTERN, QuantizeRequest
from lmq_flows.config.run import preset_names
from lmq_flows.serve.deploy import CPU_POOL, GPU_POOL, deployments_dir


def read(name: str) -> Any:
    return yaml.safe_load((deployments_dir() / name).read_text())


@pytest.mark.parametrize("deployment", read("prefect.yaml")["deployments"], ids=lambda item: item["name"])
def test_deployed_flows_exist_and_take_the_parameters(deployment: dict[str, Any]) -> None:
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    schema = parameter_schema(flow)
    assert set(deployment["parameters"]) <= set(schema.properties)
    assert deployment["parameters"].get("preset", "demo") in preset_names()
    assert deployment["work_pool"]["name"] in (CPU_POOL, GPU_POOL)


def test_passwords_come_from_the_environment_and_ports_are_for_this_machine_only() -> None:
    text = (deployments_dir() / "compose.yaml").read_text()
    services = read("compose.yaml")["services"]
    secrets = [
        value
        for service in services.values()
        for key, value in service.get("environment", {}).items()
        if re.search(r"PASSWORD|SECRET|CONNECTION_URL", key)
    ]
    assert len(secrets) >= 4
    assert all(re.search(r"\$\{\w+:\?[^}]+\}", value) for value in secrets)
    assert not re.search(r"\$\{\w+:-", text)
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_services_wait_for_services_that_exist() -> None:
    services = read("compose.yaml")["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert name in services
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[name]


def test_automations_are_what_prefect_takes() -> None:
    text = (deployments_dir() / "automations.yaml").read_text()
    text = text.replace("NOTIFICATION_BLOCK_ID", "6f2c9f5e-4d1c-4f3e-9b1d-0c9f0d6f7a11")
    found = [AutomationCore.model_validate(item) for item in yaml.safe_load(text)["automations"]]
    assert [len(item.actions) for item in found] == [1, 1]


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_job_templates_use_only_variables_that_they_declare(name: str) -> None:
    template = json.loads((deployments_dir() / "pools" / f"{name}.json").read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    assert template["variables"]["properties"]["image"]["default"] == "lmq:latest"


# ── the form ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("4.25", True), (".5 bpw", True), ("80 MB", True), ("1.1 GiB", True), ("80000000 B", True),
     ("uniform b3g64 + 2%", True), ("uniform b4g64", True), ("four", False), ("4.25 bits", False), ("80 XB", False),
     ("uniform", False), ("", False), ("-1", False)],
)  # fmt: skip
def test_the_form_takes_the_budgets_that_runs_take(text: str, allowed: bool) -> None:
    assert bool(re.search(BUDGET_PATTERN, text)) == allowed
    if allowed:
        Budget.parse(text)
    else:
        with pytest.raises(InputError):
            Budget.parse(text)


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({}, True), ({"menu": ["b3g64"]}, True), ({"menu": ["b7g64"]}, False), ({"strategy": "magic"}, False),
     ({"calibration": {"sequences": 0}}, False), ({"colour": 1}, False), ({"target": "vllm"}, True)],
)  # fmt: skip
def test_the_schema_of_the_form_refuses_what_a_run_would(changes: dict[str, Any], allowed: bool) -> None:
    request = {"model": "m", "source": "org/m", **changes}
    problems = list(Draft202012Validator(QuantizeRequest.model_json_schema()).iter_errors(request))
    assert (not problems) == allowed
    if allowed:
        config = QuantizeRequest.model_validate(request).run_config("store", "runs")
        assert config.name == "m-loss-aware-4.25"
    else:
        with pytest.raises((ValidationError, InputError)):
            QuantizeRequest.model_validate(request).run_config("store", "runs")
