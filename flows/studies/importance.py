"""Measure how much a model needs its layers, through the same cached stages as a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from lmq.errors import InputError
from lmq.layers.importance.estimates import ShapleyOptions
from lmq.layers.importance.sublayers import check_removable, find_sublayers
from lmq.layers.importance.tables import ANGULAR_DISTANCE_SCHEMA, LAYER_IMPORTANCE_SCHEMA, SUBLAYER_IMPORTANCE_SCHEMA
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.tables import read_rows
from lmq_flows.config.run import MeasurementRequest, parse_request
from lmq_flows.config.sections import CalibrationConfig
from lmq_flows.graph.model_nodes import CapturedText, ModelNodes, PreparedModel, TextIdentity
from lmq_flows.graph.node import Graph, Node
from lmq_flows.run.plan import ready_models
from lmq_flows.studies.study import execute_with_progress, model_names
from lmq_storage import ArtifactRef
from lmq_tasks.importance import ANGULAR_FILE, LAYERS_FILE, REMOVAL_FILE, SUBLAYERS_FILE
from lmq_tasks.inputs import located_dir
from lmq_tasks.stage import open_store

COMPARED_METRICS = (
    "avss",
    "avss_pooled",
    "avss_relative",
    "avss_pooled_relative",
    "block_influence",
    "angular_distance",
    "leave_one_out",
    "shapley",
)
"""Metrics that order layers by importance; the other columns are what AVSS is made of."""

R = TypeVar("R", bound=MeasurementRequest)


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """On how much text, and with how many threads, importance is measured.

    The first half of the text's documents is taken, as runs do. `removal` None leaves out what is measured by removing
    sub-layers.
    """

    text: str = "pydoc-topics"
    column: str = "text"
    sequences: int = 4
    sequence_length: int = 512
    removal: ShapleyOptions | None = field(default_factory=ShapleyOptions)
    store: str = "store"
    threads: int = 2

    def request(self, source: str, kind: type[R], **more: Any) -> R:
        """What is asked of the model on the text; `more` are sections that this kind of request has besides."""
        (name,) = model_names([source])
        return parse_request(
            kind,
            {
                "models": [{"name": name, "source": source}],
                "measure": {"also": [LAYER_ACTIVITY.name]},
                "calibration": {
                    "source": self.text,
                    "column": self.column,
                    "sequences": self.sequences,
                    "sequence_length": self.sequence_length,
                },
                "store": self.store,
                "runner": {"threads_per_worker": self.threads},
                **more,
            },
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceNodes:
    """The nodes that hold a model's importance; `removal` None was not asked for."""

    layers: Node
    removal: Node | None


@dataclass(frozen=True, kw_only=True)
class MeasuredImportance:
    """Importance of a model's layers (rows of `LAYER_IMPORTANCE_SCHEMA`) and sub-layers (`SUBLAYER_IMPORTANCE_SCHEMA`).

    `block_distances` is the angular distance over each block of `block_layers` neighbours, by its first layer.
    `removal` is what removal.json of the stage says; None: not measured.
    """

    model: str
    structure: ModelStructure
    layers: list[dict[str, Any]]
    sublayers: list[dict[str, Any]]
    block_layers: int
    block_distances: list[float]
    removal: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The compared metrics that were measured, one number per layer."""
        columns = {name: [row[name] for row in self.layers] for name in COMPARED_METRICS}
        return {name: column for name, column in columns.items() if column[0] is not None}


def measure_importance(
    source: str, options: ImportanceOptions, angular_layers: int, console: Console
) -> MeasuredImportance:
    """Measure what is not cached, with progress on the console. Raises InputError before anything is measured."""
    request = options.request(source, MeasurementRequest)
    model, texts = prepare(request, options)
    if angular_layers > model.structure.layers:
        raise InputError(
            f"a block of {angular_layers} layers is more than the {model.structure.layers} of {source}; "
            f"give --angular-layers 1 to {model.structure.layers}"
        )
    graph = Graph()
    nodes = ModelNodes(graph, model, texts)
    found = add_importance(nodes, request.calibration, options.removal, angular_layers)
    refs = execute_with_progress(graph, list(graph), console)
    return read_importance(model, found, refs)


def prepare(request: MeasurementRequest, options: ImportanceOptions) -> tuple[PreparedModel, dict[str, TextIdentity]]:
    """The model and the texts of a request, checked to be measurable. Raises InputError."""
    (model,), texts = ready_models(request)
    if options.removal is not None:
        options.removal.check(len(find_sublayers(model.structure)))
        check_removable(StreamedModel.open(model_dir_of(model), model.structure))
    return model, texts


def model_dir_of(model: PreparedModel) -> Path:
    """The directory of a model's safetensors and configuration on this machine."""
    assert model.site.model is not None
    return located_dir(open_store(model.site.store_url), model.site.model)


def add_importance(
    nodes: ModelNodes, calibration: CalibrationConfig, removal: ShapleyOptions | None, angular_layers: int
) -> ImportanceNodes:
    """Add what measures the importance of one model's layers."""
    captured = CapturedText(nodes, calibration)
    inputs: dict[str, Any] = {LAYER_ACTIVITY.name: nodes.measurement(LAYER_ACTIVITY, {}, [], captured)}
    removed = None
    if removal is not None:
        removed = inputs["removal"] = nodes.add("removal-importance", "", asdict(removal), {"tokens": captured.tokens})
    layers = nodes.add("layer-importance", "", {"angular_layers": angular_layers}, inputs)
    return ImportanceNodes(layers=layers, removal=removed)


def read_importance(
    model: PreparedModel, nodes: ImportanceNodes, refs: Mapping[Node, ArtifactRef]
) -> MeasuredImportance:
    """What the finished nodes hold."""
    store = open_store(model.site.store_url)
    layers = refs[nodes.layers]
    blocks = read_rows(store.path(layers, ANGULAR_FILE), ANGULAR_DISTANCE_SCHEMA)
    sublayers, removal = [], None
    if nodes.removal is not None:
        removed = refs[nodes.removal]
        sublayers = read_rows(store.path(removed, SUBLAYERS_FILE), SUBLAYER_IMPORTANCE_SCHEMA)
        removal = json.loads(store.path(removed, REMOVAL_FILE).read_text())
    return MeasuredImportance(
        model=model.config.name,
        structure=model.structure,
        layers=read_rows(store.path(layers, LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA),
        sublayers=sublayers,
        block_layers=blocks[0]["block_layers"],
        block_distances=[row["angular_distance"] for row in blocks],
        removal=removal,
    )
