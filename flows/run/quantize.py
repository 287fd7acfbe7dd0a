"""The flow: every model in a flow run of its own (prepare, measure, allocate, quantize, evaluate), then the report."""

from __future__ import annotations

from typing import Any, NoReturn
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import MissingResult
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from lmq.errors import LmqError
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import ModelConfig
from lmq_flows.graph.build import failed_variants
from lmq_flows.run.liveness import mark_cut_off, run_lease, signs_of_life
from lmq_flows.run.model import SOME_VARIANTS_FAILED, ModelOutcome, heal_damage, quantize_model, variants_made
from lmq_flows.run.overview import artifact_key, overview_of, summary
from lmq_flows.run.own_server import own_server_is_gone, start_own_server
from lmq_flows.run.prepare import absolute_store_url, failure_of_all, resolve_device
from lmq_flows.run.report import make_report, write_results
from lmq_flows.run.runners import check_runner, started_runner
from lmq_storage import StoreError
from lmq_tasks.engine import GPU_LIMIT
from lmq_tasks.stage import open_store


def run(config: RunConfig) -> State[Any]:
    """Run a configuration as a Prefect flow, on the server that Prefect is set to (else one of its own).

    Raises LmqError where the own server ended before the run.
    """
    start_own_server()
    try:
        return quantize_models(config, return_state=True)
    except Exception as error:
        if own_server_is_gone():
            raise LmqError(
                "Prefect's server, started for this run, was ended; finished work is kept, run again to go on"
            ) from error
        raise


def raise_failure(state: State[Any]) -> NoReturn:
    """Raise what stopped a run, so that it ends as one message and an exit code."""
    result = state.result(raise_on_failure=False)
    if isinstance(result, LmqError | StoreError | OSError | KeyboardInterrupt):
        raise result
    raise LmqError(f"the run failed: {state.message}; `prefect server start` shows the trace of the flow run")


@flow(name="lmq", flow_run_name="run {config.name}", persist_result=False)
def quantize_models(config: RunConfig) -> State[Any]:
    """Measure models once, then make and judge a checkpoint for every strategy and budget."""
    return quantize_to_the_end(config)


def quantize_to_the_end(config: RunConfig) -> State[Any]:
    """All phases of a run inside the current flow run; the state says which variants could not be made.

    Raises what stopped the models when nothing came of any.
    """
    check_runner(config.runner, absolute_store_url(config.store))
    _name_flow_run(config)
    _limit_gpu(config)
    own = UUID(flow_run.id)
    for name in mark_cut_off(own):
        get_run_logger().warning("run %r was cut off; its finished work is taken over", name)
    workspaces = open_store(absolute_store_url(config.store)).local_dir / "tmp"
    held = run_lease(config.store, config.name)
    shown = overview_of(config.name, artifact_key(config.name))
    with shown as overview, signs_of_life(own, workspaces), held, started_runner(config.runner) as runner:
        models = heal_damage(lambda: _models_and_report(config, runner))
        overview.finish(f"Made {variants_made(models).partition(';')[0]}", summary(config.run_dir))
    message = f"{variants_made(models)}; report: {config.run_dir / 'report.html'}"
    if any(model.failures for model in models):
        return Failed(name=SOME_VARIANTS_FAILED, message=message)
    return Completed(message=message)


def _models_and_report(config: RunConfig, runner: Any) -> list[ModelOutcome]:
    models = [_quantize_alone(config, model, runner) for model in config.models]
    errors = [model.error for model in models if model.error is not None]
    if len(errors) == len(models):
        raise failure_of_all(errors)
    report = make_report(config, models)
    write_results(config, models, report)
    return models


def _quantize_alone(config: RunConfig, model: ModelConfig, runner: Any) -> ModelOutcome:
    """Run one model of the configuration in a flow run of its own; an error of any kind ends only that."""
    alone = config.model_copy(update={"models": (model,)})
    configured = quantize_model.with_options(task_runner=runner)
    state = configured(alone, return_state=True)
    try:
        found = state.result(raise_on_failure=False)
    except MissingResult:  # the server answered with a state that holds no data: all is in the store, once more
        state = configured(alone, return_state=True)
        found = state.result(raise_on_failure=False)
    if isinstance(found, ModelOutcome):
        return found
    if not isinstance(found, Exception):
        raise found if isinstance(found, BaseException) else LmqError(f"{model.name}: {state.message}")
    return ModelOutcome(name=model.name, variants=failed_variants(alone, model.name, str(found)), error=found)


def _name_flow_run(config: RunConfig) -> None:
    """Say in the UI what the run is about, whoever started it and under what name."""
    with get_client(sync_client=True) as client:
        there = client.read_flow_run(flow_run.id).tags
        client.update_flow_run(flow_run.id, name=run_title(config), tags=sorted({*there, *run_tags(config)}))


def _limit_gpu(config: RunConfig) -> None:
    """Let one stage at a time work on the GPU."""
    if resolve_device(config.runner.device).startswith("cuda"):
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)


def run_title(config: RunConfig) -> str:
    """`quantize smollm2-135m loss-aware 4.25` for one variant, else `sweep demo: 1 model × 5 strategies × 1 budget`."""
    models, strategies, budgets = config.models, config.variants_of_strategies, config.budgets
    if len(models) == len(strategies) == len(budgets) == 1:
        return f"quantize {models[0].name} {strategies[0].label} {budgets[0]}"
    counted = (
        _counted(len(models), "model", "models"),
        _counted(len(strategies), "strategy", "strategies"),
        _counted(len(budgets), "budget", "budgets"),
    )
    return f"sweep {config.name}: {' × '.join(counted)}"


def run_tags(config: RunConfig) -> list[str]:
    """What finds a run in the UI: its name, models, strategies and budgets."""
    return [
        f"run:{config.name}",
        *(f"model:{model.name}" for model in config.models),
        *(f"strategy:{item.label}" for item in config.variants_of_strategies),
        *(f"budget:{text}" for text in config.budgets),
    ]


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
