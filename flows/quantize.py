"""The flow: prepare models, measure, allocate, quantize, evaluate, report; every stage a cached task."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from lmq.errors import InputError, LmqError
from lmq_flows.execute import DamagedInput, Outcome, execute
from lmq_flows.graph import Graph, Input, Node
from lmq_flows.measured_tables import write_measured_tables
from lmq_flows.names import slug
from lmq_flows.pipeline import (
    FULL_PRECISION,
    Measurements,
    PreparedModel,
    Variant,
    build_graph,
    resolve_budgets,
)
from lmq_flows.plan import plan_graph
from lmq_flows.prepare import (
    absolute_store_url,
    identify_models,
    identify_texts,
    preparation_graph,
    prepared_model,
    resolve_device,
)
from lmq_flows.progress import ArtifactReporter, RunProgress, TerminalReporter
from lmq_flows.run_config import RunConfig
from lmq_flows.ui import publish_results
from lmq_storage import ArtifactRef
from lmq_tasks import STAGES
from lmq_tasks.engine import GPU_LIMIT
from lmq_tasks.reporting import CARDS_FOLDER, card_file
from lmq_tasks.stage import Site, open_store

SOME_VARIANTS_FAILED = "SomeVariantsFailed"
"""Name of the state of a run that wrote its report, but could not make every variant."""

_ATTEMPTS = 3
"""Walks over the graph when artifacts turn out to be damaged in mid run."""


def run(config: RunConfig) -> State[Any]:
    """Run a configuration as a Prefect flow, on the server that Prefect is set to (else one of its own)."""
    store_url = absolute_store_url(config.store)
    runner: Any = ThreadPoolTaskRunner(max_workers=config.runner.workers)
    configured = quantize_models.with_options(
        task_runner=runner,
        flow_run_name=config.name,
        result_storage=_record_storage(store_url),
    )
    return configured(config, return_state=True)


def _record_storage(store_url: str) -> Any:
    """Where Prefect keeps its records of finished tasks: beside the artifacts."""
    name = f"lmq-{slug(store_url)[-40:].strip('-.').replace('.', '-')}"
    if "://" in store_url:
        block: Any = RemoteFileSystem(basepath=f"{store_url}/records")
    else:
        block = LocalFileSystem(basepath=f"{store_url}/records")
    block.save(name, overwrite=True)
    return block


@flow(name="lmq", persist_result=False)
def quantize_models(config: RunConfig) -> State[Any]:
    """Measure models once, then make and judge a checkpoint for every strategy and budget."""
    device = resolve_device(config.runner.device)
    if device.startswith("cuda"):
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)
    with TerminalReporter(Console()) as terminal:
        progress = RunProgress([terminal, ArtifactReporter()])
        for attempt in range(_ATTEMPTS):
            try:
                return _Run(config, device, progress).to_the_end()
            except DamagedInput as damage:
                if attempt == _ATTEMPTS - 1:
                    raise LmqError(f"artifacts keep getting damaged while the run is on: {damage}") from damage
    raise AssertionError


@dataclass
class _Run:
    """One walk through all phases of a run."""

    config: RunConfig
    device: str
    progress: RunProgress
    _preparation_uris: list[str] = field(default_factory=list)

    def to_the_end(self) -> State[Any]:
        models = self._prepare()
        for model in models:
            resolve_budgets(self.config, model)
        graph, variants, measured = build_graph(self.config, models, identify_texts(self.config))
        _check_disk_space(graph)
        outcomes = self._execute(graph)
        in_order = {node: outcomes[node] for node in graph}
        report = self._report(models, variants, measured, in_order)
        run_dir = self._write_results(report, variants, outcomes)
        store = open_store(absolute_store_url(self.config.store))
        refs = {node: outcome.ref for node, outcome in outcomes.items()}
        write_measured_tables(run_dir / "measurements", store, measured, refs)
        publish_results(run_dir)
        failed = [variant for variant in variants if _evaluation_failed(variant, outcomes)]
        message = f"{len(variants) - len(failed)} of {len(variants)} variants; report: {run_dir / 'report.html'}"
        return Failed(name=SOME_VARIANTS_FAILED, message=message) if failed else Completed(message=message)

    def _execute(self, graph: Graph) -> dict[Node, Outcome]:
        self.progress.expect(graph)
        return execute(graph, in_flight=self.config.runner.workers, watch=self.progress.watch)

    def _prepare(self) -> list[PreparedModel]:
        identified = identify_models(self.config)
        graph, structures = preparation_graph(self.config, identified)
        outcomes = self._execute(graph)
        self._preparation_uris = [outcome.ref.uri for outcome in outcomes.values() if outcome.ref is not None]
        models = []
        for model in identified:
            node = structures[model.config.name]
            ref = outcomes[node].ref
            if ref is None:
                raise InputError(outcomes[node].error or f"{model.config.name} could not be read")
            models.append(prepared_model(self.config, model.config, node, ref, self.device))
        return models

    def _report(
        self,
        models: Sequence[PreparedModel],
        variants: Sequence[Variant],
        measured: dict[str, Measurements],
        outcomes: dict[Node, Outcome],
    ) -> ArtifactRef:
        inputs = _report_inputs(models, variants, measured, outcomes)
        states = {outcome.ref.uri: outcome.state for outcome in outcomes.values() if outcome.ref is not None}
        site = Site(store_url=absolute_store_url(self.config.store), states=states)
        graph = Graph()
        node = graph.add(
            STAGES["report"],
            self.config.name,
            site,
            config={
                "run": self.config.name,
                "models": [model.config.name for model in models],
                "variants": [_variant_record(variant, outcomes) for variant in variants],
                "config": _shown_config(self.config),
            },
            inputs=inputs,
        )
        outcome = self._execute(graph)[node]
        if outcome.ref is None:
            raise LmqError(outcome.error or "the report could not be made")
        store = open_store(site.store_url)
        uris = sorted({*states, outcome.ref.uri, *self._preparation_uris})
        store.write_text(f"runs/{self.config.name}.json", _lines(uris))
        return outcome.ref

    def _write_results(self, report: ArtifactRef, variants: Sequence[Variant], outcomes: dict[Node, Outcome]) -> Path:
        store = open_store(absolute_store_url(self.config.store))
        run_dir = self.config.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        files = store.files(report)
        for name, path in files.items():
            if not name.startswith(f"{CARDS_FOLDER}/"):
                _copy_atomically(path, run_dir / name)
        for variant in variants:
            if variant.checkpoint is not None and (ref := outcomes[variant.checkpoint].ref) is not None:
                name = variant_slug(variant)
                store.materialize(ref, run_dir / "checkpoints" / name, beside={"README.md": files[card_file(name)]})
        (run_dir / "config.yaml").write_text(_config_text(self.config))
        return run_dir


def variant_slug(variant: Variant) -> str:
    """Name of the variant's files."""
    return slug(variant.label)


def _evaluation_failed(variant: Variant, outcomes: dict[Node, Outcome]) -> bool:
    assert variant.evaluation is not None
    return outcomes[variant.evaluation].ref is None


def _variant_record(variant: Variant, outcomes: dict[Node, Outcome]) -> dict[str, Any]:
    assert variant.evaluation is not None
    return {
        "model": variant.model.config.name,
        "strategy": variant.strategy.label if variant.strategy else FULL_PRECISION,
        "budget": variant.budget,
        "budget_bytes": variant.budget_bytes,
        "slug": variant_slug(variant),
        "error": outcomes[variant.evaluation].error,
    }


def _report_inputs(
    models: Sequence[PreparedModel],
    variants: Sequence[Variant],
    measured: dict[str, Measurements],
    outcomes: dict[Node, Outcome],
) -> dict[str, Input | list[Input]]:
    """Everything that is there, by name; what failed or was not asked for is left out."""

    def there(nodes: Sequence[Node]) -> list[Input]:
        return [ref for node in nodes if (ref := outcomes[node].ref) is not None]

    inputs: dict[str, Input | list[Input]] = {}
    for model in models:
        name = model.config.name
        inputs[f"{name} structure"] = model.structure_ref
        of_model = [node for node in outcomes if node.site.model == model.site.model]
        inputs[f"{name} all"] = there(of_model)
        for signal in ("kurtosis", "sensitivity", "frobenius", "fisher", "sequence_fisher"):
            nodes = getattr(measured[name], signal)
            if nodes and len(there(nodes)) == len(nodes):
                inputs[f"{name} {signal}"] = there(nodes)
        outliers = measured[name].outliers
        if outliers is not None and outcomes[outliers].ref is not None:
            inputs[f"{name} outliers"] = there([outliers])[0]
    for number, variant in enumerate(variants):
        for part in ("allocation", "checkpoint", "evaluation"):
            node: Node | None = getattr(variant, part)
            if node is not None and outcomes[node].ref is not None:
                inputs[f"variant {number} {part}"] = there([node])[0]
    return inputs


def _shown_config(config: RunConfig) -> str:
    """The configuration as the report shows it: without what differs between machines."""
    return _config_text(config, exclude={"runner", "store", "runs_dir"})


def _config_text(config: RunConfig, exclude: set[str] | None = None) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", exclude=exclude), sort_keys=False)


def _check_disk_space(graph: Graph) -> None:
    """Refuse to start what cannot be finished: compare what will be kept with the free space of a local store."""
    store_url = next(iter(graph)).site.store_url
    if "://" in store_url:
        return
    needed = sum(planned.size_bytes or 0 for planned in plan_graph(graph) if not planned.cached)
    free = shutil.disk_usage(store_url).free
    if needed > free:
        raise InputError(
            f"the run keeps about {needed / 1e9:.2f} GB in {store_url}, where {free / 1e9:.2f} GB are free; "
            "free space (`lmq store gc`), set `store` to another place, or use fewer calibration tokens"
        )


def _copy_atomically(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _lines(items: Sequence[str]) -> str:
    return "\n".join(items) + "\n"
