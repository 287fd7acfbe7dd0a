"""The frontier of a finished run: its measurements found again in the store, and every budget solved from them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmq.allocation.embeddings import decides_on_embeddings
from lmq.allocation.frontier import FrontierPoint, budget_steps, frontier, uniform_points, within_target
from lmq.allocation.strategies import strategy
from lmq.allocation.targets import target_named
from lmq.errors import InputError, unknown_name
from lmq.formats.spec import QuantSpec
from lmq.measurement.frobenius import FROBENIUS
from lmq.model.structure import ModelStructure
from lmq.report.results import VariantResult, read_results
from lmq_flows.config.run import RunConfig, load_run_config
from lmq_flows.config.sections import StrategyConfig
from lmq_flows.graph.build import Variant, build_graph
from lmq_flows.graph.model_nodes import PreparedModel
from lmq_flows.graph.node import Graph, Node, resolve_inputs
from lmq_flows.run.prepare import (
    absolute_store_url,
    identify_models,
    identify_texts,
    preparation_graph,
    prepared_model,
)
from lmq_storage import ArtifactRef
from lmq_tasks.allocate import read_measurements
from lmq_tasks.stage import Job, open_store, stage_key

_DIVERGENCES = {"sequence_fisher", "divergence"}
"""Measurements whose costs are divergences from full precision, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class RunFrontier:
    """The frontier of one model of a run, with what its costs predict for uniform models and what was measured.

    `costs_are_divergences` says that costs are in nats per token and can be compared with measured divergences.
    """

    model: str
    strategy: str
    target: str | None
    structure: ModelStructure
    costs_are_divergences: bool
    points: Sequence[FrontierPoint]
    uniform: dict[QuantSpec, FrontierPoint]
    results: list[VariantResult]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The configuration and the results of a run that has ended."""

    run_dir: Path
    config: RunConfig
    results: list[VariantResult]

    @classmethod
    def open(cls, run_dir: Path) -> FinishedRun:
        """Read a run's directory. Raises InputError when the run or its store is not there."""
        results = read_results(run_dir / "results.json")
        config_path = run_dir / "config.yaml"
        if not config_path.is_file():
            raise InputError(f"{config_path} is not there; the run has not ended, run it again")
        config = load_run_config(config_path)
        if "://" not in config.store and not Path(config.store).is_dir():
            raise InputError(f"there is no store {config.store}; work in the folder that the run was started in")
        return cls(run_dir=run_dir, config=config, results=results)

    @property
    def models(self) -> list[str]:
        """Names of the run's models."""
        return [model.name for model in self.config.models]

    def frontier(self, model: str, strategy_name: str, points: int, target: str | None = None) -> RunFrontier:
        """Solve `points` budgets of a model, from the smallest to the largest feasible size.

        `strategy_name` is a strategy's name, or its label in the run's table where the name is there twice. With a
        `target`, plans are over what it holds of the run's menu, by the run's own costs. Raises InputError for what the
        run does not have or the target does not hold, or when the store no longer holds it.
        """
        wanted = [item for item in self.config.models if item.name == model]
        if not wanted:
            raise unknown_name(f"model of run {self.config.name!r}:", model, self.models)
        chosen = _chosen(self.config, strategy_name)
        others = tuple(item for item in self.config.variants_of_strategies if item.label != chosen.label)
        asked = {"models": tuple(wanted), "strategies": (chosen, *others), "quantizers": ()}
        config = self.config.model_copy(update=asked)
        job, structure = _allocation_job(config, self.run_dir)
        measurements = read_measurements(job, structure)
        if target is not None:
            measurements = within_target(measurements, target_named(target))
        program = strategy(chosen.name, **chosen.options)
        if structure.embeddings and not decides_on_embeddings(program):
            raise InputError(
                f"strategy {chosen.label!r} does not decide about embeddings, which this run quantizes; loss-aware and "
                "uniform do, and have a frontier"
            )
        return RunFrontier(
            model=model,
            strategy=chosen.label,
            target=target,
            structure=structure,
            costs_are_divergences=bool(program.needs) and program.needs <= _DIVERGENCES,
            points=frontier(program, measurements, budget_steps(measurements, points)),
            uniform=uniform_points(program, measurements),
            results=[result for result in self.results if result.model == model],
        )


def write_points(path: Path, found: RunFrontier) -> None:
    """Write the frontier as CSV, one row per budget."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["budget_bytes", "bits_per_weight", "size_bytes", "objective", "lower_bound", "gap"])
        for point in found.points:
            bits = 8 * point.size_bytes / found.structure.parameters
            sizes = [point.budget_bytes, f"{bits:.6f}", point.size_bytes]
            writer.writerow([*sizes, point.objective, point.lower_bound, point.gap])


def _chosen(config: RunConfig, name: str) -> StrategyConfig:
    """The run's strategy of this label or name; one that the run did not ask for, if it measured what that needs."""
    tried = config.variants_of_strategies
    labelled = [item for item in tried if item.label == name]
    named = labelled or [item for item in tried if item.name == name]
    if len(named) > 1:
        raise InputError(f"the run has {name!r} with several options; name one of: {_labels(named)}")
    needs = strategy(named[0].name, **named[0].options).needs if named else strategy(name).needs
    missing = needs - config.needs - {FROBENIUS.name}
    if missing:
        raise InputError(
            f"the run did not measure {', '.join(sorted(missing))}, which {name} needs; "
            f"draw a strategy of the run ({_labels(tried)}), or add {name} to it and run it again"
        )
    return named[0] if named else StrategyConfig(name=name)


def _labels(strategies: Sequence[StrategyConfig]) -> str:
    return ", ".join(repr(item.label) for item in strategies)


def _allocation_job(config: RunConfig, run_dir: Path) -> tuple[Job, ModelStructure]:
    """What the allocation of the first strategy of a run with one model works with, all of it from the store."""
    store = open_store(absolute_store_url(config.store))
    model, graph, variants = finished_graph(config, run_dir)
    allocation = next(variant.allocation for variant in variants if variant.allocation is not None)
    refs = refs_above(graph, allocation.parents, run_dir)
    inputs = resolve_inputs(allocation, {done: ref.to_json() for done, ref in refs.items()})
    job = Job(store, allocation.site, allocation.config, inputs, output=run_dir)
    return job, model.structure


def finished_graph(config: RunConfig, run_dir: Path) -> tuple[PreparedModel, Graph, list[Variant]]:
    """The first model of a run that has ended, the graph of the run and its variants. Raises as `refs_above`."""
    preparation, structures = preparation_graph(config, identify_models(config))
    node = structures[config.models[0].name]
    structure_ref = refs_above(preparation, [node], run_dir)[node]
    model = prepared_model(config, config.models[0], node, structure_ref, "cpu")
    graph, variants, _ = build_graph(config, [model], identify_texts(config))
    return model, graph, variants


def refs_above(graph: Graph, wanted: Sequence[Node], run_dir: Path) -> dict[Node, ArtifactRef]:
    """Artifacts of the wanted nodes and of all that they were made from. Raises InputError when one is gone."""
    refs: dict[Node, ArtifactRef] = {}
    for node in graph.leading_to(wanted):
        store = open_store(node.site.store_url)
        inputs = resolve_inputs(node, {done: ref.to_json() for done, ref in refs.items()})
        manifest = store.manifest(node.stage.name, stage_key(store, node.stage, node.config, inputs))
        if manifest is None:
            raise InputError(
                f"the store {node.site.store_url} does not hold {node.stage.name} of {node.label}: it was removed, or "
                f"this lmq measures differently (`lmq plan {run_dir / 'config.yaml'}` says why); "
                "make it again with `lmq run` of that file"
            )
        refs[node] = manifest.ref
    return refs
