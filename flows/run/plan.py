"""Inspecting models, checking runs and planning them, without starting Prefect."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmq.errors import InputError
from lmq.evaluation.zero_shot import is_local_task, lm_eval_version
from lmq.model.structure import ModelStructure
from lmq.text.data_sets import PREFIX as DATA_SET
from lmq.text.known_texts import KNOWN_TEXTS, known_text_note
from lmq_flows.config.run import MeasurementRequest, RunConfig, parse_request
from lmq_flows.config.sections import ModelConfig
from lmq_flows.graph.build import PreparedModel, TextIdentity, Variant, build_graph, resolve_budgets
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.explain import PlannedNode, plan_graph
from lmq_flows.run.prepare import (
    absolute_store_url,
    check_context_of,
    check_directory,
    check_target,
    check_texts,
    failure_of_all,
    identify_model,
    identify_models,
    identify_texts,
    preparation_graph,
    prepared_model,
    read_structure_of,
    resolve_device,
)
from lmq_tasks.inputs import located_dir
from lmq_tasks.retries import is_transient
from lmq_tasks.stage import open_store

_SEE_TEXTS = ("calibration", "embed", "evaluation-tokens", "reference", "images", "reference-images", "pairs")
"""Stages that draw tokens, and those that first show them to the model: what went through them needs no check."""

_MAKE_MODELS = ("convert", "equalize")
"""Stages that make the directory of a model, without which there is nothing to plan."""


@dataclass(frozen=True, kw_only=True)
class InspectedModel:
    """A model's structure, and the directory of its safetensors and configuration on this machine."""

    structure: ModelStructure
    model_dir: Path


def inspect_model(source: str, store: str, dtype: str = "exact", *, embeddings: bool = False) -> InspectedModel:
    """Inspect a model, reading no weights; a GGUF file is converted into the store first, to `dtype`.

    With `embeddings` they are to be quantized too. Raises UnsupportedModel where they cannot be.
    """
    model = {"name": "model", "source": source, "dtype": dtype}
    config = parse_request(MeasurementRequest, {"models": [model], "store": store, "embeddings": embeddings})
    graph, structures = preparation_graph(config, identify_models(config))
    node = structures["model"]
    ref = execute_directly(graph)[node]
    opened = open_store(absolute_store_url(store))
    assert node.site.model is not None
    return InspectedModel(structure=read_structure_of(opened, ref), model_dir=located_dir(opened, node.site.model))


def check_run(config: RunConfig) -> list[str]:
    """Refuse what can be refused before Prefect starts and anything is measured. Raises InputError.

    Returns what the user should know before the work starts, such as what the target leaves out of the menus.

    That is a run of which no variant can be made; where some can, the others fail by name in the run. Models that must
    be converted first are checked once they are. Reads no weights.
    """
    check_directory(config.run_dir, "runs_dir")
    try:
        return _Ready.of(config).notes(config)
    except InputError as error:
        if not is_transient(error):  # the run tries to reach the hub again, later and later
            raise
        return []


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run would do: its nodes, models that must be converted before more can be said, what would fail.

    `notes` are those of `check_run`.
    """

    nodes: list[PlannedNode]
    to_convert: list[str]
    problems: list[str]
    notes: list[str]


def plan_run(config: RunConfig) -> RunPlan:
    """What a run would do.

    A model that needs no conversion is inspected on the way, which reads no weights. Raises InputError when no
    variant of the run could be made.
    """
    ready = _Ready.of(config)
    nodes, problems = ready.preparation, [str(error) for error in ready.problems]
    problems += dict.fromkeys(variant.error for variant in ready.variants if variant.error)
    return RunPlan(
        nodes=nodes + ready.planned, to_convert=ready.to_convert, problems=problems, notes=ready.notes(config)
    )


def ready_models(config: MeasurementRequest) -> tuple[list[PreparedModel], dict[str, TextIdentity]]:
    """The models of a request or run, converted and inspected where that was not done, and its texts, checked.

    Raises InputError as a run would, and for a model that sees images, which texts say nothing of.
    """
    graph, _ = preparation_graph(config, identify_models(config))
    execute_directly(graph)
    ready = _Ready.of(config)
    for model in ready.models:
        if model.images is not None:
            raise InputError(f"{model.config.source} sees images, and studies are made on texts; compare runs instead")
    return ready.models, ready.texts


@dataclass(kw_only=True)
class _Ready:
    """What a run starts from, as far as it can be had without a conversion, and checked."""

    texts: dict[str, TextIdentity]
    preparation: list[PlannedNode] = field(default_factory=list)
    models: list[PreparedModel] = field(default_factory=list)
    planned: list[PlannedNode] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    to_convert: list[str] = field(default_factory=list)
    problems: list[InputError] = field(default_factory=list)
    _not_seen: list[PreparedModel] = field(default_factory=list)

    @classmethod
    def of(cls, config: MeasurementRequest) -> _Ready:
        """Look at every model. Raises InputError when none can be used."""
        device = resolve_device(config.runner.device)
        check_directory(open_store(absolute_store_url(config.store)).local_dir, "store")
        ready = cls(texts=identify_texts(config))
        for model in config.models:
            try:
                ready._add(config, model, device)
            except InputError as error:
                ready.problems.append(error)
        if len(ready.problems) == len(config.models):
            raise failure_of_all(ready.problems)
        check_texts(config, ready._not_seen)
        return ready

    def notes(self, config: RunConfig) -> list[str]:
        """What names of texts mean, what models keep as it is, and what the target leaves out of their menus."""
        texts = [
            f"{source} is read as it is now: {text.identity}"
            if source.startswith(DATA_SET)
            else known_text_note(source)
            for source, text in self.texts.items()
            if source.startswith(DATA_SET) or source in KNOWN_TEXTS
        ]
        kept, left_out = [], []
        for model in self.models:
            notes = (*model.structure.kept_notes, *model.structure.kept_beside)
            kept += [f"{model.config.name} keeps {note} as it is" for note in notes]
            left_out += config.left_out_of_menu(model.config, model.structure.quantized)
        return texts + _tasks_note(config) + kept + left_out

    def _add(self, config: MeasurementRequest, model: ModelConfig, device: str) -> None:
        identified = identify_model(config, model)
        graph, nodes = preparation_graph(config, [identified])
        planned = plan_graph(graph)
        if any(item.node.stage.name in _MAKE_MODELS and not item.cached for item in planned):
            self.to_convert.append(model.name)
        else:
            node = nodes[model.name]
            ready = prepared_model(config, model, node, execute_directly(graph)[node], device)
            planned_run, variants = self._plan(config, ready) if isinstance(config, RunConfig) else ([], [])
            seeing = [item for item in planned_run if item.node.stage.name in _SEE_TEXTS]
            if not seeing or not all(item.cached for item in seeing):
                check_context_of(config, ready)
                check_target(config, ready)
                self._not_seen.append(ready)
            self.planned += planned_run
            self.variants += variants
            self.models.append(ready)
        self.preparation += planned

    def _plan(self, config: RunConfig, model: PreparedModel) -> tuple[list[PlannedNode], list[Variant]]:
        """The nodes of a model's run, and its variants."""
        resolve_budgets(config, model)
        graph, variants, _ = build_graph(config, [model], self.texts)
        return plan_graph(graph), variants


def _tasks_note(config: RunConfig) -> list[str]:
    """That tasks of lm-eval go by their names: what the hub holds under these is not looked at."""
    names = [task for task in config.evaluation.tasks if not is_local_task(task)]
    if not names:
        return []
    return [f"{', '.join(names)}: known by name and lm-eval {lm_eval_version()}, not by the questions on the hub"]
