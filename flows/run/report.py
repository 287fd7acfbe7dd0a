"""The report of a run: the stage that makes it from what the models left, and the files written beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lmq.errors import LmqError
from lmq_flows.config.names import slug
from lmq_flows.config.run import RunConfig
from lmq_flows.graph.build import Variant
from lmq_flows.graph.node import Graph, Input, Node
from lmq_flows.run.liveness import run_lease
from lmq_flows.run.measured_tables import write_measured_tables
from lmq_flows.run.model import ModelOutcome, execute_with_progress
from lmq_flows.run.prepare import absolute_store_url
from lmq_storage import ArtifactRef
from lmq_tasks import STAGES
from lmq_tasks.report import CARDS_FOLDER, card_file
from lmq_tasks.report_variants import InputsOf
from lmq_tasks.stage import Site, open_store


def make_report(config: RunConfig, models: Sequence[ModelOutcome]) -> ArtifactRef:
    """Run the stage that reports, and note in the store which artifacts the run needs."""
    states = {
        outcome.ref.uri: outcome.state
        for model in models
        for outcome in model.outcomes.values()
        if outcome.ref is not None
    }
    site = Site(store_url=absolute_store_url(config.store), states=states)
    graph = Graph()
    node = graph.add(
        STAGES["report"],
        "",
        config.name,
        site,
        config={
            "run": config.name,
            "models": [model.name for model in models if model.model is not None],
            "variants": [_variant_record(variant, model) for model in models for variant in model.variants],
            "config": _shown_config(config),
        },
        inputs=_report_inputs(models),
    )
    outcome = execute_with_progress(graph, config)[node]
    if outcome.ref is None:
        raise LmqError(outcome.error or "the report could not be made")
    preparation = [uri for model in models for uri in model.preparation_uris]
    with run_lease(config.store, config.name) as lease:
        lease.finish({*states, outcome.ref.uri, *preparation})
    return outcome.ref


def write_results(config: RunConfig, models: Sequence[ModelOutcome], report: ArtifactRef) -> None:
    """Write the report, the tables, the checkpoints and the configuration into the run's directory."""
    store = open_store(absolute_store_url(config.store))
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    files = store.files(report)
    for name, path in files.items():
        if not name.startswith(f"{CARDS_FOLDER}/"):
            _copy_atomically(path, run_dir / name)
    refs: dict[Node, ArtifactRef | None] = {}
    for model in models:
        refs |= {node: outcome.ref for node, outcome in model.outcomes.items()}
        for variant in model.variants:
            if variant.checkpoint is not None and (ref := refs[variant.checkpoint]) is not None:
                name = variant_slug(variant)
                store.materialize(ref, run_dir / "checkpoints" / name, beside={"README.md": files[card_file(name)]})
    measured = {model.name: model.measured for model in models if model.measured is not None}
    write_measured_tables(run_dir / "measurements", store, measured, refs)
    (run_dir / "config.yaml").write_text(_config_text(config))


def variant_slug(variant: Variant) -> str:
    """Name of the variant's files."""
    return slug(variant.label)


def _variant_record(variant: Variant, model: ModelOutcome) -> dict[str, Any]:
    return {
        "model": variant.model,
        "strategy": variant.strategy_label,
        "quantizer": variant.quantizer,
        "budget": variant.budget,
        "budget_bytes": variant.budget_bytes,
        "slug": variant_slug(variant),
        "error": model.error_of(variant),
        "tasks": {task: _own_words(node, model) for task, node in variant.tasks.items()},
    }


def _own_words(node: Node, model: ModelOutcome) -> str | None:
    """Why a node failed, without the name of its task run; None when it did not."""
    error = model.outcomes[node].error
    return None if error is None else error.removeprefix(f"{node.stage.name} {node.label}: ")


def _report_inputs(models: Sequence[ModelOutcome]) -> dict[str, Input | list[Input]]:
    """Everything that is there, by name; what failed or was not asked for is left out."""
    inputs: dict[str, Input | list[Input]] = {}
    for model in models:
        inputs |= _model_inputs(model)
    pairs = [(model, variant) for model in models for variant in model.variants]
    for number, (model, variant) in enumerate(pairs):
        parts = {
            part: getattr(variant, part)
            for part in ("allocation", "learned", "polished", "checkpoint", "evaluation", "performance")
        }
        own = InputsOf.variant(number)
        named = {own.part(part): node for part, node in parts.items()}
        named |= {own.task(task): node for task, node in variant.tasks.items()}
        for name, node in named.items():
            if node is not None and (ref := model.outcomes[node].ref) is not None:
                inputs[name] = ref
    return inputs


def _model_inputs(model: ModelOutcome) -> dict[str, Input | list[Input]]:
    """What was measured of one model, where all of its layers are there."""
    if model.model is None or model.measured is None:
        return {}

    def there(nodes: Sequence[Node]) -> list[Input]:
        return [ref for node in nodes if (ref := model.outcomes[node].ref) is not None]

    own = InputsOf.model(model.name)
    inputs: dict[str, Input | list[Input]] = {
        own.part("structure"): model.model.structure_ref,
        own.part("all"): there(list(model.outcomes)),
    }
    for name, nodes in model.measured.tables.items():
        if len(found := there(nodes)) == len(nodes):
            inputs[own.part(name)] = found
    outliers = model.measured.outliers
    if outliers is not None and (found := there([outliers])):
        inputs[own.part("outliers")] = found[0]
    return inputs


def _shown_config(config: RunConfig) -> str:
    """The configuration as the report shows it: without what differs between machines."""
    return _config_text(config, exclude={"runner", "store", "runs_dir"})


def _config_text(config: RunConfig, exclude: set[str] | None = None) -> str:
    plain = config.model_dump(mode="json", exclude=exclude)
    return yaml.safe_dump({"name": plain["name"], **plain}, sort_keys=False)


def _copy_atomically(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
