"""Prune a model in depth by an importance metric, and judge the metric against other ways to choose layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from lmq.errors import InputError
from lmq.evaluation.options import EvaluationOptions
from lmq.evaluation.windows import WINDOWS_SCHEMA, Evaluation, summarize
from lmq.layers.prune import (
    check_prunable,
    choose_contiguous_layers,
    choose_layers,
    choose_random_layers,
    layers_to_remove,
    write_pruned,
)
from lmq.tables import read_rows
from lmq_flows.config.run import MeasurementRequest
from lmq_flows.config.sections import EvaluationConfig, TextConfig
from lmq_flows.graph.model_nodes import ModelNodes
from lmq_flows.graph.node import Graph, Node
from lmq_flows.run.prepare import check_directory
from lmq_flows.studies.importance import (
    ImportanceOptions,
    MeasuredImportance,
    add_importance,
    model_dir_of,
    prepare,
    read_importance,
)
from lmq_flows.studies.study import execute_with_progress
from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.evaluate import WINDOWS_FILE
from lmq_tasks.stage import open_store

RANKING_METRICS = {
    "avss": "avss",
    "avss-authors": "avss_pooled",
    "avss-relative": "avss_relative",
    "avss-authors-relative": "avss_pooled_relative",
    "block-influence": "block_influence",
    "shapley": "shapley",
    "leave-one-out": "leave_one_out",
}
"""Name of a metric that ranks layers one by one → its column in the table of layers."""

ANGULAR = "angular"
"""The block of neighbouring layers of least angular distance."""

PRUNING_METRICS = (*RANKING_METRICS, ANGULAR)
MEASURED_BY_REMOVAL = ("shapley", "leave-one-out")

WHOLE = "whole model"
"""Stands where the others say what chose the layers."""


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What is removed, where the checkpoint goes, and on what text the choices are judged.

    The second half of the evaluation text's documents is taken, which never overlaps the first that importance is
    measured on. Windows are half a window apart. `random_draws` draws of layers, by `seed`, `seed` + 1, …, and the best
    contiguous block are judged beside the metric's choice.
    """

    metric: str
    fraction: float = 0.25
    out: Path
    evaluation: str = EvaluationOptions.source
    tokens: int = EvaluationOptions.tokens
    window: int = EvaluationOptions.window
    random_draws: int = 1
    seed: int = 42


class PruningRequest(MeasurementRequest):
    """What is measured of a model, and on what text it is judged without some of its layers."""

    evaluation: EvaluationConfig

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The texts that tokens are drawn from: to measure on, and to judge on."""
        return (self.calibration, self.evaluation)


@dataclass(frozen=True, kw_only=True)
class JudgedRemoval:
    """Layers that one way to choose removes (none: the whole model), and what the model without them is worth."""

    chosen_by: str
    layers: tuple[int, ...]
    evaluation: Evaluation


def prune(
    source: str, importance: ImportanceOptions, options: PruningOptions, console: Console
) -> tuple[MeasuredImportance, list[JudgedRemoval]]:
    """Write the model without the layers that the metric finds least important to `options.out`.

    Returns the importance and the whole model, the metric's choice and those it is compared with, judged in this order.
    No checkpoint is written of the comparisons: their blocks are left out of the evaluation. Raises InputError before
    anything is measured for what cannot work.
    """
    if options.metric not in MEASURED_BY_REMOVAL:
        importance = replace(importance, removal=None)
    check_directory(options.out.parent, "--out")
    if options.out.exists():
        raise InputError(f"{options.out} exists already; remove it or choose another place")
    stride = max(1, options.window // 2)
    judged_on = {"source": options.evaluation, "column": importance.column, "tokens": options.tokens}
    evaluation = {**judged_on, "window": options.window, "stride": stride}
    request = importance.request(source, PruningRequest, evaluation=evaluation)
    model, texts = prepare(request, importance)
    count = layers_to_remove(model.structure.layers, options.fraction)
    store = open_store(model.site.store_url)
    model_dir = model_dir_of(model)
    check_prunable(model_dir, model.structure)
    graph = Graph()
    nodes = ModelNodes(graph, model, texts)
    judge = _Judge(nodes, request.evaluation)
    found = add_importance(nodes, request.calibration, importance.removal, count)
    measured = read_importance(model, found, execute_with_progress(graph, [judge.whole, found.layers], console))
    choices = _choices(measured, options)
    judging = [judge.whole, *(judge.without(layers, chosen_by) for chosen_by, layers in choices.items())]
    refs = execute_with_progress(graph, judging, console)
    judged = [
        JudgedRemoval(chosen_by=chosen_by, layers=tuple(layers), evaluation=_read_evaluation(store, refs[node]))
        for node, (chosen_by, layers) in zip(judging, {WHOLE: [], **choices}.items(), strict=True)
    ]
    write_pruned(model_dir, model.structure, choices[options.metric], options.out)
    return measured, judged


class _Judge:
    """Adds nodes that evaluate a model with layers left out."""

    def __init__(self, nodes: ModelNodes, evaluation: EvaluationConfig):
        self._nodes = nodes
        self._windows = {"window": evaluation.window, "stride": evaluation.stride}
        self._tokens = nodes.tokens("evaluation-tokens", evaluation, {"tokens": evaluation.tokens})
        self.whole = nodes.add("reference", "", self._windows, {"tokens": self._tokens})

    def without(self, layers: list[int], chosen_by: str) -> Node:
        """The evaluation of the model without these layers."""
        config = {"removed": layers, **self._windows}
        return self._nodes.add("evaluate-without-layers", chosen_by, config, {"tokens": self._tokens})


def _choices(measured: MeasuredImportance, options: PruningOptions) -> dict[str, list[int]]:
    """The layers to remove by the metric, then by what it is compared with."""
    contiguous = choose_contiguous_layers(measured.block_distances, measured.block_layers)
    if options.metric == ANGULAR:
        choices = {ANGULAR: contiguous}
    else:
        choices = {options.metric: choose_layers(measured.metrics[RANKING_METRICS[options.metric]], options.fraction)}
    for seed in range(options.seed, options.seed + options.random_draws):
        choices[f"random, seed {seed}"] = choose_random_layers(measured.structure.layers, options.fraction, seed=seed)
    return {**choices, ANGULAR: contiguous}


def _read_evaluation(store: ArtifactStore, ref: ArtifactRef) -> Evaluation:
    return summarize(read_rows(store.path(ref, WINDOWS_FILE), WINDOWS_SCHEMA))
