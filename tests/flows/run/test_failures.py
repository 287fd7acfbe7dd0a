"""What fails in a sweep is named and leaves the rest; the network is tried again, what the user gave is not."""

from __future__ import annotations

import errno

import httpx
import pytest
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterParentFlowRunId

import lmq_flows.run.find
import lmq_flows.run.prepare
import lmq_tasks.engine
from lmq.errors import InputError, LmqError
from lmq.report.results import read_results
from lmq_flows.cli import main
from lmq_flows.run.overview import summary
from lmq_flows.run.plan import plan_run
from lmq_flows.run.prepare import failure_of_all
from lmq_flows.run.quantize import quantize_model, run_tags, run_title
from lmq_storage import StoreError
from lmq_tasks.retries import RETRIES, STORE_RETRIES, STORE_UNAVAILABLE, is_transient
from lmq_tasks.stage import Site
from tests.flows.conftest import run_and_look, tiny_config


def test_a_model_whose_state_came_back_without_data_is_taken_from_the_store(server, tiny_llama, tmp_path, monkeypatch):
    """As when a server that was told of the end twice answers with a state of its own."""
    ends = []

    class Answered:
        def with_options(self, **options):
            real = quantize_model.with_options(**options)

            def run(config, return_state):
                state = real(config, return_state=return_state)
                ends.append(state)
                return state.model_copy(update={"data": None}) if len(ends) == 1 else state

            return run

    monkeypatch.setattr("lmq_flows.run.quantize.quantize_model", Answered())
    config = tiny_config(tiny_llama, tmp_path, strategies=["uniform"])
    done = run_and_look(config)
    assert done.state.is_completed()
    assert len(ends) == 2
    assert [result.error for result in read_results(config.run_dir / "results.json")] == [None, None]


@pytest.fixture
def sweep(request, tmp_path):
    """Six variants: four that can be made, a budget below what one model can have, and a model that is not there."""
    names = ("tiny_llama", "tiny_qwen", "tiny_gemma", "tiny_phi")
    models = [{"name": name, "source": str(request.getfixturevalue(name))} for name in names]
    models.append({"name": "large", "source": models[0]["source"], "menu": ["b8g64"]})
    models.append({"name": "lost", "source": str(tmp_path / "lost")})
    return tiny_config(tmp_path, tmp_path, name="six", models=models, strategies=["uniform"])


@pytest.mark.slow
def test_a_sweep_finishes_four_of_six_and_reports_two(server, sweep, tmp_path, capsys):
    (tmp_path / "six.yaml").write_text(yaml.safe_dump(sweep.model_dump(mode="json")))
    assert main(["run", str(tmp_path / "six.yaml")]) == 1
    assert "no model directory" in capsys.readouterr().out
    results = [result for result in read_results(sweep.run_dir / "results.json") if result.strategy == "uniform"]
    assert len(results) == 6
    made, failed = results[:4], results[4:]
    assert all(result.perplexity and result.error is None for result in made)
    assert "is below the smallest feasible budget" in failed[0].error
    assert "there is no model directory" in failed[1].error
    assert all(result.perplexity is None and result.size_bytes is None for result in failed)
    page = (sweep.run_dir / "report.html").read_text()
    assert "there is no model directory" in page
    told = summary(sweep.run_dir)
    assert "- **lost uniform b4g64**: there is no model directory" in told
    assert (sweep.run_dir / "checkpoints" / "tiny-llama-uniform-uniform-b4g64").as_uri() in told
    with get_client(sync_client=True) as client:
        name = FlowRunFilterName(any_=["sweep six: 6 models × 1 strategy × 1 budget"])
        run = max(client.read_flow_runs(flow_run_filter=FlowRunFilter(name=name)), key=lambda item: item.start_time)
        parent = FlowRunFilterParentFlowRunId(any_=[run.id])
        of_models = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    assert tasks
    assert not any(task.tags for task in tasks)
    assert run.state.name == "SomeVariantsFailed"
    assert run.state.type.value == "FAILED"
    assert run.state.message.startswith("4 of 6 variants; failed: large uniform @ uniform b4g64: ")
    assert "lost uniform @ uniform b4g64: there is no model directory" in run.state.message
    assert {"run:six", "model:lost", "strategy:uniform", "budget:uniform b4g64"} <= set(run.tags)
    states = {item.name.removesuffix(" of six"): item.state.name for item in of_models}
    assert states == dict.fromkeys(("tiny_llama", "tiny_qwen", "tiny_gemma", "tiny_phi"), "Completed") | {
        "large": "BadInput",
        "lost": "BadInput",
    }


def test_the_plan_of_a_sweep_says_what_would_fail(sweep):
    plan = plan_run(sweep)
    assert {item.node.label.partition(" ")[0] for item in plan.nodes} >= {"tiny_llama", "tiny_phi"}
    assert len(plan.problems) == 2
    assert "'uniform b4g64' of model large" in plan.problems[0]
    assert "there is no model directory" in plan.problems[1]


def test_a_sweep_of_which_nothing_can_be_made_is_refused(tiny_llama, tmp_path):
    lost = [{"name": name, "source": str(tmp_path / name)} for name in ("lost", "gone")]
    with pytest.raises(InputError, match=r"no model directory .*lost.*; there is no model directory .*gone"):
        plan_run(tiny_config(tmp_path, tmp_path, models=lost))


def test_one_error_for_many():
    assert failure_of_all([LmqError("a")]).args == ("a",)
    assert isinstance(failure_of_all([InputError("a"), InputError("b")]), InputError)
    assert not isinstance(failure_of_all([InputError("a"), LmqError("b")]), InputError)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_are_called_what_they_do(tiny_llama, tmp_path):
    one = tiny_config(tiny_llama, tmp_path, strategies=["loss-aware"], budgets=["4.25"])
    assert run_title(one) == "quantize tiny loss-aware 4.25"
    assert run_tags(one) == ["run:tiny", "model:tiny", "strategy:loss-aware", "budget:4.25"]
    many = tiny_config(tiny_llama, tmp_path, budgets=["4.25", "3.25"])
    assert run_title(many) == "sweep tiny: 1 model × 5 strategies × 2 budgets"


# ── what goes away by waiting ────────────────────────────────────────────────────────────────────────────


def raised_from(cause: Exception) -> InputError:
    error = InputError("could not be fetched")
    error.__cause__ = cause
    return error


def answer(status: int) -> Exception:
    request = httpx.Request("GET", "https://example.org")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError(16, "SlowDown"),
        httpx.ConnectError("no route"),
        raised_from(httpx.ReadTimeout("slow")),
        raised_from(answer(503)),
        answer(429),
    ],
)
def test_troubles_of_the_network_are_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [InputError("bits=5"), FileNotFoundError(2, "no"), OSError(28, "full"), raised_from(answer(404)), ValueError(),
     raised_from(OfflineModeIsEnabled("offline"))],
)  # fmt: skip
def test_troubles_of_the_input_are_not(error):
    assert not is_transient(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "times", "calls", "completed"),
    [
        (httpx.ConnectError("no route"), 2, 3, True),
        (httpx.ConnectError("no route"), 99, RETRIES + 1, False),
        (answer(404), 99, 1, False),
    ],
)
def test_the_hub_is_asked_again_when_it_cannot_be_reached(
    server, tiny_llama, tmp_path, monkeypatch, trouble, times, calls, completed
):
    asked = []

    def locate(source):
        asked.append(source)
        if len(asked) <= times:
            raise raised_from(trouble)
        return original(source)

    original = lmq_flows.run.prepare.locate
    monkeypatch.setattr(lmq_flows.run.prepare, "locate", locate)
    monkeypatch.setattr(lmq_flows.run.find, "_find", lmq_flows.run.find._find.with_options(retry_delay_seconds=0))
    done = run_and_look(tiny_config(tiny_llama, tmp_path, strategies=["uniform"], measure__menu=["b4g64"]))
    assert done.state.is_completed() == completed
    assert len(asked) == calls


@pytest.mark.slow
def test_a_store_that_was_asked_six_times_already_gets_one_more_chance(server, tmp_path, monkeypatch):
    asked, states, url = [], [], str(tmp_path / "store")

    def unanswered(*arguments):
        asked.append(arguments)
        raise StoreError("cannot read x, 6 times over") from OSError(errno.EBUSY, "SlowDown")

    monkeypatch.setattr(lmq_tasks.engine, "run_stage", unanswered)
    task = lmq_tasks.engine.stage_task("allocate").with_options(retry_delay_seconds=0)
    item = {"label": "x", "site": Site(store_url=url).to_json(), "config": {}, "inputs": {}}

    @flow(name="ask")
    def ask():
        states.append(task("allocate · x", [item], total=1, return_state=True))

    ask()
    (state,) = states
    assert state.name == STORE_UNAVAILABLE
    assert state.message == "allocate x: cannot read x, 6 times over"
    assert len(asked) == STORE_RETRIES + 1
