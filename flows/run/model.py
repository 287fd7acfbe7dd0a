"""One model of a run, as a flow run of its own: what befalls it leaves the other models alone."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from rich.console import Console

from lmq.errors import InputError, LmqError
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import ModelConfig
from lmq_flows.graph.build import (
    FULL_PRECISION,
    MeasuredModel,
    PreparedModel,
    Variant,
    build_graph,
    failed_variants,
    resolve_budgets,
)
from lmq_flows.graph.direct import Outcome
from lmq_flows.graph.explain import PlannedNode, plan_graph
from lmq_flows.graph.node import Graph, Node
from lmq_flows.graph.progress import Reporter, RunProgress, TerminalReporter
from lmq_flows.graph.walk import DamagedInput, execute
from lmq_flows.run.find import find_model, share_models
from lmq_flows.run.liveness import keeping, run_lease
from lmq_flows.run.overview import current_overview
from lmq_flows.run.prepare import (
    absolute_store_url,
    check_context_of,
    check_target,
    identify_texts,
    preparation_graph,
    prepared_model,
    resolve_device,
)
from lmq_storage import StoreError
from lmq_tasks.engine import BAD_INPUT

SOME_VARIANTS_FAILED = "SomeVariantsFailed"
"""Name of the state of a run that wrote its report, but could not make every variant."""

_ATTEMPTS = 3
"""Walks over the graph when artifacts turn out to be damaged in mid run."""

T = TypeVar("T")


@dataclass(kw_only=True)
class ModelOutcome:
    """What became of a model's variants. `error` is what stopped the model as a whole; then nothing else is there."""

    name: str
    variants: list[Variant]
    outcomes: dict[Node, Outcome] = field(default_factory=dict)
    preparation_uris: list[str] = field(default_factory=list)
    model: PreparedModel | None = None
    measured: MeasuredModel | None = None
    error: Exception | None = None

    def error_of(self, variant: Variant) -> str | None:
        """Why a variant was not made; None when it was."""
        if variant.evaluation is None:
            return variant.error
        return self.outcomes[variant.evaluation].error

    @property
    def failures(self) -> dict[str, str]:
        """Message of every variant that was not made, by its label."""
        return {variant.label: error for variant in self.asked if (error := self.error_of(variant)) is not None}

    @property
    def asked(self) -> list[Variant]:
        """The variants and baselines, without the full-precision model that they are compared with."""
        return [variant for variant in self.variants if variant.strategy_label != FULL_PRECISION]

    @property
    def state(self) -> State[Any]:
        """State of the model's flow run, which carries this outcome."""
        if self.error is not None:
            name = BAD_INPUT if isinstance(self.error, InputError) else "Failed"
            return Failed(name=name, message=str(self.error), data=self)
        message = variants_made([self])
        if self.failures:
            return Failed(name=SOME_VARIANTS_FAILED, message=message, data=self)
        return Completed(message=message, data=self)


def variants_made(models: list[ModelOutcome]) -> str:
    """`4 of 6 variants; failed: ...`: how many were made, and which were not, with the reason."""
    asked = sum(len(model.asked) for model in models)
    failures = {label: error for model in models for label, error in model.failures.items()}
    labels_of: dict[str, list[str]] = {}
    for label, error in failures.items():
        labels_of.setdefault(error, []).append(label)
    text = f"{asked - len(failures)} of {asked} variants"
    if failures:
        text += "; failed: " + "; ".join(f"{', '.join(labels)}: {error}" for error, labels in labels_of.items())
    return text


def model_run_name() -> str:
    """Name of the flow run of one model of a run, from its parameters."""
    given = flow_run.parameters["config"]
    config = given if isinstance(given, RunConfig) else RunConfig.model_validate(given)
    return f"{config.models[0].name} of {config.name}"


@flow(name="lmq-model", flow_run_name=model_run_name, persist_result=False)
def quantize_model(config: RunConfig) -> State[Any]:
    """Measure the one model of a configuration, then make and judge a checkpoint for every strategy and budget."""
    (model,) = config.models
    try:
        with run_lease(config.store, config.name):
            return heal_damage(lambda: _walk(config, model)).state
    except (LmqError, StoreError) as error:
        variants = failed_variants(config, model.name, str(error))
        return ModelOutcome(name=model.name, variants=variants, error=error).state


def heal_damage(walk: Callable[[], T]) -> T:
    """Walk again when artifacts turn out to be damaged, which makes them anew."""
    for attempt in range(_ATTEMPTS):
        try:
            return walk()
        except DamagedInput as damage:
            if attempt == _ATTEMPTS - 1:
                raise LmqError(f"artifacts keep getting damaged while the run is on: {damage}") from damage
    raise AssertionError


def execute_with_progress(
    graph: Graph, config: RunConfig, model: str = "", planned: Sequence[PlannedNode] | None = None
) -> dict[Node, Outcome]:
    """Run a graph's nodes, those of one model, in the current flow run, shown on the terminal and in the UI.

    `planned` is what `plan_graph` says of the graph, where that is known.
    """
    overview = current_overview()
    with run_lease(config.store, config.name) as lease, TerminalReporter(Console()) as terminal:
        reporters: list[Reporter] = [terminal]
        progress = RunProgress(reporters)
        progress.explain(plan_graph(graph) if planned is None else planned)
        if overview is not None:
            overview.follow(model, progress.stages)
            reporters.append(overview)
        runner = config.runner
        return execute(
            graph,
            in_flight=runner.workers,
            watch=keeping(lease, progress.watch),
            chunk_seconds=runner.seconds_per_task,
            elsewhere=runner.kind != "threads",
        )


def _walk(config: RunConfig, model_config: ModelConfig) -> ModelOutcome:
    model, preparation_uris = _prepare(config, model_config)
    resolve_budgets(config, model)
    graph, variants, measured = build_graph(config, [model], identify_texts(config))
    planned = plan_graph(graph)
    if not all(item.cached for item in planned):
        check_context_of(config, model)
        check_target(config, model)
        import_what_computes()
    with run_lease(config.store, config.name) as lease:
        lease.use(item.uri for item in planned if item.uri is not None)
    _check_disk_space(absolute_store_url(config.store), planned)
    outcomes = execute_with_progress(graph, config, model_config.name, planned)
    return ModelOutcome(
        name=model_config.name,
        variants=variants,
        outcomes={node: outcomes[node] for node in graph},
        preparation_uris=preparation_uris,
        model=model,
        measured=measured[model_config.name],
    )


def import_what_computes() -> None:
    """Import what stages need, before threads would do so at once: modules of transformers import each other."""
    for name in ("transformers.models.auto.modeling_auto", "lmq.checkpoint.hf", "scipy.stats"):
        importlib.import_module(name)


def _prepare(config: RunConfig, model: ModelConfig) -> tuple[PreparedModel, list[str]]:
    """The model, converted and inspected, and the artifacts that came of that."""
    (identified,) = share_models(config, [find_model(config, model)])
    if identified.shared is not None:
        with run_lease(config.store, config.name) as lease:
            lease.use([identified.shared.uri])
    graph, structures = preparation_graph(config, [identified])
    outcomes = execute_with_progress(graph, config, model.name)
    node = structures[model.name]
    ref = outcomes[node].ref
    if ref is None:
        raise LmqError(outcomes[node].error or f"{model.name} could not be read")
    uris = [outcome.ref.uri for outcome in outcomes.values() if outcome.ref is not None]
    uris += [] if identified.shared is None else [identified.shared.uri]
    return prepared_model(config, model, node, ref, resolve_device(config.runner.device)), uris


def _check_disk_space(store_url: str, planned: Sequence[PlannedNode]) -> None:
    """Refuse to start what cannot be finished: compare what will be kept with the free space of a local store."""
    if "://" in store_url:
        return
    needed = sum(item.size_bytes or 0 for item in planned if not item.cached)
    free = shutil.disk_usage(store_url).free
    if needed > free:
        raise InputError(
            f"the run keeps about {needed / 1e9:.2f} GB in {store_url}, where {free / 1e9:.2f} GB are free; "
            "free space (`lmq store gc`), set `store` to another place, or use fewer calibration tokens"
        )
