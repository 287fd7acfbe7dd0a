"""The flows that `deployments/prefect.yaml` deploys: a sweep, one model on demand, and a watch over models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from prefect import flow
from prefect.states import Completed, State
from prefect.variables import Variable

from lmq.model.source import ModelSource
from lmq_flows.config.names import slug
from lmq_flows.config.request import QuantizeRequest
from lmq_flows.config.run import RunConfig, load_run_config, preset_names, preset_path
from lmq_flows.config.sections import ModelConfig
from lmq_flows.run.prepare import identify_model
from lmq_flows.run.quantize import quantize_to_the_end

UNCHANGED = "Unchanged"
"""Name of the state of a watch that found nothing new."""


@flow(name="lmq-sweep", flow_run_name="sweep {preset}", persist_result=False)
def sweep(preset: str = "demo", store: str = "store", runs_dir: str = "runs", changes: tuple[str, ...] = ()) -> Any:
    """Models × strategies × budgets of a preset, or of a configuration file that the worker can read.

    Args:
        preset: Name of a preset, or path of a configuration file.
        store: Where artifacts are kept: a directory or any fsspec URL.
        runs_dir: Where results are written.
        changes: Overrides as of `lmq run --set`, such as "evaluation.tokens=4096".
    """
    return quantize_to_the_end(_configured(preset, store, runs_dir, changes))


@flow(name="lmq-quantize", flow_run_name="quantize {request.model}", persist_result=False)
def quantize_one(request: QuantizeRequest, store: str = "store", runs_dir: str = "runs") -> Any:
    """One model with one strategy under one budget.

    Args:
        request: What to quantize, and how small.
        store: Where artifacts are kept: a directory or any fsspec URL.
        runs_dir: Where results are written.
    """
    return quantize_to_the_end(request.run_config(store, runs_dir))


@flow(name="lmq-watch", flow_run_name="watch {preset}", persist_result=False)
def watch(preset: str = "demo", store: str = "store", runs_dir: str = "runs", changes: tuple[str, ...] = ()) -> Any:
    """Look whether models of a preset changed since they were last quantized, and run those that did.

    A hub model has changed when the hub names another revision, any other when its files have another digest. What is
    known is a Prefect variable, so that any worker may look.

    Args:
        preset: Name of a preset, or path of a configuration file.
        store: Where artifacts are kept: a directory or any fsspec URL.
        runs_dir: Where results are written.
        changes: Overrides as of `lmq run --set`.
    """
    config = _configured(preset, store, runs_dir, changes)
    variable = f"lmq_watch_{slug(config.name).replace('.', '_').replace('-', '_')}"
    known: dict[str, str] = dict(Variable.get(variable, default={}))
    found = {model.name: _revision(config, model) for model in config.models}
    changed = tuple(model for model in config.models if known.get(model.name) != found[model.name])
    if not changed:
        return Completed(name=UNCHANGED, message=f"{len(found)} models are as they were; nothing to do")
    state: State[Any] = quantize_to_the_end(config.model_copy(update={"models": changed}))
    Variable.set(variable, found, overwrite=True)
    return state


def _revision(config: RunConfig, model: ModelConfig) -> str:
    """What changes when the model does; asks the hub without downloading weights."""
    source = ModelSource.parse(model.source, model.sha256)
    if source.kind == "hub":
        return str(huggingface_hub.HfApi().model_info(source.place, revision=source.revision).sha)
    return identify_model(config, model).sha256


def _configured(preset: str, store: str, runs_dir: str, changes: tuple[str, ...]) -> RunConfig:
    path = preset_path(preset) if preset in preset_names() else Path(preset)
    return load_run_config(path, (*changes, f"store={store}", f"runs_dir={runs_dir}"))
