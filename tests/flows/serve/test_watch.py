"""A watched model is quantized again when it changes, and only then; runs cut off elsewhere are told by silence."""

from __future__ import annotations

import shutil
import time
from types import SimpleNamespace

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from lmq_flows.run.liveness import ALIVE_AT, PROCESS, _is_cut_off
from lmq_flows.serve.deployed import UNCHANGED, watch
from lmq_storage.processes import process_token
from tests.flows.conftest import tiny_config


@pytest.mark.slow
def test_a_watched_model_runs_when_it_changes(server, tiny_llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = tiny_config(model, tmp_path, name="watched", strategies=["uniform"], measure__menu=["b4g64"])
    path = tmp_path / "watched.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    options = {"preset": str(path), "store": config.store, "runs_dir": config.runs_dir}
    first = watch(**options, return_state=True)
    assert first.name == "Completed", first.message
    second = watch(**options, return_state=True)
    assert second.name == UNCHANGED
    assert "nothing to do" in second.message
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert watch(**options, return_state=True).name == "Completed"
    with get_client(sync_client=True) as client:
        name = FlowRunFilterName(any_=["quantize tiny uniform uniform b4g64"])
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=name))
        names = [run.name for run in found if "watched" in str(run.parameters.get("preset"))]
    assert names.count("quantize tiny uniform uniform b4g64") == 2


def test_a_process_of_this_machine_is_looked_up_and_one_elsewhere_is_judged_by_its_silence():
    def run(process: str, silent_s: float) -> SimpleNamespace:
        return SimpleNamespace(labels={PROCESS: process, ALIVE_AT: time.time() - silent_s})

    own = process_token()
    place = own.split("-")[0]
    assert not _is_cut_off(run(own, 1e6))
    assert _is_cut_off(run(f"{place}-{2**22 + 1}-5", 0))
    assert not _is_cut_off(run("0123456789ab-1-1", 60))
    assert _is_cut_off(run("0123456789ab-1-1", 3600))
