"""Studies: measure with everything varied that may matter, through the same cached stages as a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lmq.errors import InputError
from lmq.formats import FORMATS, rounding_format
from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import SENSITIVITY
from lmq.measurement.base import Cost
from lmq.measurement.delta_loss import DELTA_LOSS
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.module_divergence import DIVERGENCE
from lmq.measurement.registry import COSTS
from lmq.model.structure import PARTS, ModuleId
from lmq.quantizers import QUANTIZERS
from lmq.report.study import CostPair, Profile, Setting, sample_pairs
from lmq.tables import read_rows
from lmq.text.calibration import PYDOC_TOPICS
from lmq_flows.config.names import slug
from lmq_flows.config.run import MeasurementRequest, parse_request
from lmq_flows.config.sections import CalibrationConfig
from lmq_flows.graph.direct import execute_directly
from lmq_flows.graph.model_nodes import CapturedText, ModelNodes
from lmq_flows.graph.node import Graph, Node
from lmq_flows.graph.progress import RunProgress, TerminalReporter
from lmq_flows.run.liveness import keeping, run_lease
from lmq_flows.run.plan import ready_models
from lmq_storage import ArtifactRef
from lmq_tasks.allocate import spec_of
from lmq_tasks.stage import open_store

STUDY_QUANTIZERS = (*QUANTIZERS, *FORMATS)
"""Formats such as NF4 are measured only: no checkpoint holds them."""

Profiles = dict[Setting, dict[str, Profile]]
"""Sensitivity of every part over the layers, by setting."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What both studies take: how much calibration text, and where and with how many threads work is done."""

    sequences: int = 16
    sequence_length: int = 512
    store: str = "store"
    threads: int = 2

    def request(self, models: Sequence[str], text: str, menu: Sequence[str]) -> MeasurementRequest:
        """What is asked of the models on a text.

        A given text is used whole; of the built-in one the part that runs calibrate on, whose states are shared.
        """
        return parse_request(
            MeasurementRequest,
            {
                "models": [{"name": name, "source": source} for name, source in model_names(models).items()],
                "measure": {"menu": list(menu)},
                "calibration": {
                    "source": text,
                    "part": "first" if text == PYDOC_TOPICS else "all",
                    "sequences": self.sequences,
                    "sequence_length": self.sequence_length,
                },
                "store": self.store,
                "runner": {"threads_per_worker": self.threads},
            },
        )


def model_names(sources: Sequence[str]) -> dict[str, str]:
    """A short name for every source: its last part; what comes again gets a number."""
    names: dict[str, str] = {}
    for source in sources:
        base = name = slug(Path(source.partition("@")[0]).stem) or "model"
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names[name] = source
    return names


def text_names(sources: Sequence[str]) -> dict[str, str]:
    """Source → a short name: a file's name where that tells it from the others, else the source."""
    names = [Path(source).name for source in sources]
    return {
        source: name if names.count(name) == 1 and not source.startswith("dataset:") else source
        for source, name in zip(sources, names, strict=True)
    }


def stored_bits_per_weight(setting: Setting) -> float:
    """Bits per weight of what a setting's quantizer makes of its configuration; a format has a formula of its own."""
    spec = QuantSpec.parse(setting.configuration)
    if setting.quantizer in FORMATS:
        return rounding_format(setting.quantizer, group_size=spec.group_size).bits_per_weight
    return spec.bits_per_weight


@dataclass(frozen=True, kw_only=True)
class SensitivityStudy:
    """Activation sensitivity of every combination of model, text, quantizer and configuration.

    A format such as NF4 is measured at the configurations that have its bits. Raises InputError where there is none.
    """

    models: tuple[str, ...]
    texts: tuple[str, ...] = (PYDOC_TOPICS,)
    quantizers: tuple[str, ...] = ("hqq",)
    configurations: tuple[str, ...] = ("b4g64",)
    options: StudyOptions = field(default_factory=StudyOptions)

    def __post_init__(self) -> None:
        for name in FORMATS.keys() & set(self.quantizers):
            if not self._specs(name):
                bits = FORMATS[name].bits
                raise InputError(
                    f"{name} has {bits} bits, and so has none of {', '.join(self.configurations)}; add b{bits}g64"
                )

    def measure(self, console: Console) -> Profiles:
        """Measure what is not cached, with progress on the console. Raises InputError as a run would."""
        graph = Graph()
        nodes = self._add_nodes(graph)
        refs = execute_with_progress(graph, [node for layers in nodes.values() for node in layers], console)
        return {setting: _profiles(layers, refs) for setting, layers in nodes.items()}

    def _add_nodes(self, graph: Graph) -> dict[Setting, list[Node]]:
        found: dict[Setting, list[Node]] = {}
        grids: dict[tuple[str, str], list[Node]] = {}
        for text, text_name in text_names(self.texts).items():
            request = self.options.request(self.models, text, self.configurations)
            models, texts = ready_models(request)
            for model in models:
                nodes = ModelNodes(graph, model, texts)
                captured = CapturedText(nodes, request.calibration)
                for quantizer in self.quantizers:
                    for spec in self._specs(quantizer):
                        setting = Setting(
                            model=model.config.name, text=text_name, quantizer=quantizer, configuration=spec.name
                        )
                        found[setting] = self._sensitivity(nodes, setting, captured, grids)
        return found

    def _sensitivity(
        self, nodes: ModelNodes, setting: Setting, captured: CapturedText, grids: dict[tuple[str, str], list[Node]]
    ) -> list[Node]:
        """Nodes of one setting; `grids` are shared by the texts and configurations of a model and a quantizer."""
        settings = {"spec": setting.configuration}
        if setting.quantizer in FORMATS:
            settings["quantizer"] = setting.quantizer
            return nodes.per_layer(SENSITIVITY.stage, settings, hidden=captured.entering)
        key = (setting.model, setting.quantizer)
        if key not in grids:
            grids[key] = nodes.grids(self._specs(setting.quantizer), {"name": setting.quantizer, "axis": 1})
        return nodes.measurement(SENSITIVITY, settings, grids[key], captured)

    def _specs(self, quantizer: str) -> list[QuantSpec]:
        specs = sorted(map(QuantSpec.parse, self.configurations), key=lambda spec: spec.bits_per_weight)
        return [spec for spec in specs if quantizer not in FORMATS or spec.bits == FORMATS[quantizer].bits]


@dataclass(frozen=True, kw_only=True)
class CostStudy:
    """Cheap costs of single modules beside the exact one, for a sample of modules and configurations.

    The exact cost is the divergence of the model with that module alone quantized, on the first `exact_sequences`
    calibration sequences; the cheap ones are measured on all of them.
    """

    model: str
    text: str = PYDOC_TOPICS
    configurations: tuple[str, ...] = ("b2g64", "b3g64", "b4g64")
    pairs: int = 60
    exact_sequences: int = 4
    label_draws: int = 4
    seed: int = 0
    options: StudyOptions = field(default_factory=StudyOptions)

    def measure(self, console: Console) -> list[CostPair]:
        """Measure what is not cached, with progress on the console. Raises InputError as a run would."""
        request = self.options.request([self.model], self.text, self.configurations)
        (model,), texts = ready_models(request)
        sample = sample_pairs(model.structure.modules, model.menu, self.pairs, self.seed)
        graph = Graph()
        tables = self._add_nodes(ModelNodes(graph, model, texts), request.calibration, sample)
        refs = execute_with_progress(graph, [node for nodes in tables.values() for node in nodes], console)
        rows = {name: _by_pair(nodes, refs, COSTS[name]) for name, nodes in tables.items()}
        return [_cost_pair(pair, rows) for pair in sample]

    def _add_nodes(
        self, nodes: ModelNodes, calibration: CalibrationConfig, sample: Sequence[tuple[ModuleId, QuantSpec]]
    ) -> dict[str, list[Node]]:
        """Nodes of every cost's table, for the layers and configurations that were drawn."""
        captured = CapturedText(nodes, calibration, self.label_draws)
        grids = nodes.grids(nodes.model.menu, {"name": "hqq", "axis": 1})
        settings = {"menu": [spec.name for spec in nodes.model.menu]}
        layers = sorted({module.layer for module, _ in sample})
        tables = {FROBENIUS.name: [grids[layer] for layer in layers]}
        for name, cost in COSTS.items():
            if name not in (FROBENIUS.name, DELTA_LOSS.name, DIVERGENCE.name):
                of_layer = nodes.measurement(cost, settings, grids, captured)
                tables[name] = [of_layer[layer] for layer in layers]
        drawn = sorted({spec for _, spec in sample})
        tables[DELTA_LOSS.name] = nodes.delta_loss([spec.name for spec in drawn], grids, captured.tokens)
        tables[DIVERGENCE.name] = []
        for layer in layers:
            pairs = [[module.kind, spec.name] for module, spec in sample if module.layer == layer]
            config = {"pairs": pairs, "sequences": self.exact_sequences}
            inputs = {"grids": grids[layer], "hidden": captured.entering[layer], "last": captured.last}
            tables[DIVERGENCE.name].append(nodes.add_layer(DIVERGENCE.stage, layer, config, inputs))
        return tables


_Rows = dict[tuple[ModuleId, QuantSpec], dict[str, Any]]


def _by_pair(nodes: Sequence[Node], refs: Mapping[Node, ArtifactRef], cost: Cost) -> _Rows:
    rows = (row for node in nodes for row in read_rows(_path(node, refs, cost.file), cost.schema))
    return {(ModuleId(row["layer"], row["kind"]), spec_of(row)): row for row in rows}


def _cost_pair(pair: tuple[ModuleId, QuantSpec], rows: Mapping[str, _Rows]) -> CostPair:
    cheap = {
        column.label: column.studied(rows[cost.name][pair])
        for cost in COSTS.values()
        if cost is not DIVERGENCE
        for column in cost.columns
    }
    exact = rows[DIVERGENCE.name][pair]
    return CostPair(
        module=pair[0],
        spec=pair[1],
        exact=exact["divergence"],
        exact_stderr=exact["divergence_stderr"],
        cheap={name: value for name, value in cheap.items() if value is not None},
    )


def _profiles(nodes: Sequence[Node], refs: Mapping[Node, ArtifactRef]) -> dict[str, Profile]:
    """Part → one number per layer; None for layers that have no such part."""
    found: dict[str, list[float | None]] = {part: [None] * len(nodes) for part in PARTS}
    for layer, node in enumerate(nodes):
        for row in read_rows(_path(node, refs, SENSITIVITY.file), SENSITIVITY.schema):
            found[row["part"]][layer] = row["sensitivity"]
    return {part: profile for part, profile in found.items() if any(value is not None for value in profile)}


def _path(node: Node, refs: Mapping[Node, ArtifactRef], file: str) -> Path:
    return open_store(node.site.store_url).path(refs[node], file)


def execute_with_progress(graph: Graph, wanted: Sequence[Node], console: Console) -> dict[Node, ArtifactRef]:
    """Make the wanted nodes without Prefect, showing how far every stage is."""
    nodes = graph.leading_to(wanted)
    with run_lease(nodes[0].site.store_url, "study") as lease, TerminalReporter(console) as terminal:
        progress = RunProgress([terminal])
        progress.expect(nodes)
        return execute_directly(graph, wanted, watch=keeping(lease, progress.watch))
