"""Which stage feeds which: the graph of a run, from models, strategies and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lmq.allocation import check_feasible_program
from lmq.budget import Budget, check_feasible, module_sizes
from lmq.module_divergence import default_specs
from lmq.quant_spec import QuantSpec
from lmq.strategies import strategy
from lmq.structure import ModelStructure
from lmq_flows.graph import FileOf, Graph, Input, Node
from lmq_flows.run_config import CalibrationConfig, ModelConfig, RunConfig, StrategyConfig, TextConfig
from lmq_storage import ArtifactRef
from lmq_tasks import STAGES
from lmq_tasks.stage import Site

FLOAT32_BYTES = 4
FULL_PRECISION = "full-precision"


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """A text: what identifies its content, and where it lies on this machine."""

    identity: str
    location: str


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that was identified: its structure, the artifact that holds it, and where its files lie."""

    config: ModelConfig
    structure: ModelStructure
    structure_ref: ArtifactRef
    site: Site
    menu: tuple[QuantSpec, ...]


@dataclass(kw_only=True)
class Variant:
    """A model × strategy × budget with the nodes that make it; full precision has no allocation."""

    model: PreparedModel
    strategy: StrategyConfig | None
    budget: str | None
    budget_bytes: int | None
    allocation: Node | None = None
    checkpoint: Node | None = None
    evaluation: Node | None = None
    quantized: list[Node] = field(default_factory=list)

    @property
    def label(self) -> str:
        """`smollm2 loss-aware @ uniform b4g64`."""
        if self.strategy is None:
            return f"{self.model.config.name} {FULL_PRECISION}"
        return f"{self.model.config.name} {self.strategy.label} @ {self.budget}"


@dataclass(kw_only=True)
class Measurements:
    """Nodes that measure one model; a list has one node per layer, None was not asked for."""

    frobenius: list[Node]
    kurtosis: list[Node]
    sensitivity: list[Node]
    fisher: list[Node]
    sequence_fisher: list[Node]
    divergence: list[Node]
    outliers: Node | None
    trials: dict[str, Input | list[Input]]
    """Inputs of the stage that tries plans on the model, beside the tables of its candidates."""


def resolve_budgets(config: RunConfig, model: PreparedModel) -> dict[str, int]:
    """Bytes of every budget for a model. Raises InfeasibleBudget or InputError before anything is measured."""
    budgets = {text: Budget.parse(text).resolve(model.structure) for text in config.budgets}
    for text, budget_bytes in budgets.items():
        what = f"the budget {text!r} of model {model.config.name}"
        check_feasible(budget_bytes, model.structure, model.menu, what=what)
        if config.constraints.plain:
            modules = model.structure.modules
            constraints = config.constraints.parsed().compile(modules, model.menu)
            check_feasible_program(module_sizes(modules, model.menu), budget_bytes, constraints)
    return budgets


def build_graph(
    config: RunConfig, models: list[PreparedModel], texts: dict[str, TextIdentity]
) -> tuple[Graph, list[Variant], dict[str, Measurements]]:
    """The graph of a whole run; measurements are made once per model and shared by its variants."""
    graph = Graph()
    variants: list[Variant] = []
    measured: dict[str, Measurements] = {}
    for model in models:
        builder = _ModelGraph(graph, config, model, texts)
        measured[model.config.name] = builder.measurements
        variants += builder.variants()
    return graph, variants, measured


class _ModelGraph:
    """Adds the nodes of one model to a graph."""

    def __init__(self, graph: Graph, config: RunConfig, model: PreparedModel, texts: dict[str, TextIdentity]):
        self._graph = graph
        self._config = config
        self._model = model
        self._texts = texts
        self._needs = config.needs
        self.measurements = self._measure()

    def _add(self, stage: str, what: str, config: dict[str, Any], inputs: dict[str, Any], **options: Any) -> Node:
        label = f"{self._model.config.name} {what}".strip()
        site = options.pop("site", self._model.site)
        inputs = {"structure": self._model.structure_ref, **inputs}
        return self._graph.add(STAGES[stage], label, site, config=config, inputs=inputs, **options)

    def _per_layer(
        self, stage: str, config: dict[str, Any], expected_bytes: int | None = None, **inputs: Any
    ) -> list[Node]:
        return [
            self._add(
                stage,
                f"layer {layer}",
                {"layer": layer, **config},
                {name: nodes[layer] for name, nodes in inputs.items()},
                expected_bytes=expected_bytes,
            )
            for layer in range(self._model.structure.layers)
        ]

    def _tokens(self, stage: str, text: TextConfig, sizes: dict[str, int], what: str = "") -> Node:
        identity = self._texts[text.source]
        config = {"text": identity.identity, "column": text.column, "part": text.part, "seed": text.seed, **sizes}
        site = replace(self._model.site, text=identity.location)
        return self._add(stage, what, config, {}, site=site, expected_bytes=12 * sizes["tokens"])

    def _measure(self) -> Measurements:
        measure = self._config.measure
        also = {QuantSpec.parse(measure.sensitivity_spec)} if "sensitivity" in self._needs else set()
        specs = sorted({*self._model.menu, *also}, key=lambda spec: spec.bits_per_weight)
        quantizer = {"name": measure.quantizer, "axis": measure.axis}
        menu = [spec.name for spec in specs]
        frobenius = self._per_layer("frobenius", {"menu": menu, "quantizer": quantizer}, self._grid_bytes(specs))
        kurtosis = self._per_layer("kurtosis", {}) if "kurtosis" in self._needs else []
        sensitivity: list[Node] = []
        fisher: list[Node] = []
        sequence_fisher: list[Node] = []
        divergence: list[Node] = []
        trials: dict[str, Input | list[Input]] = {}
        if self._config.needs_calibration:
            hidden, last, tokens = self._capture_forward()
            keep = last.expected_bytes
            if "trials" in self._needs:
                trials = {"tokens": tokens, "hidden": last, "validation": self._validation_tokens()}
            if "sensitivity" in self._needs:
                spec = {"spec": measure.sensitivity_spec}
                sensitivity = self._per_layer("sensitivity", spec, frobenius=frobenius, hidden=hidden)
            menu = [spec.name for spec in self._model.menu]
            if "fisher" in self._needs:
                gradient = self._add("loss-gradient", "", {}, {"hidden": last, "tokens": tokens}, expected_bytes=keep)
                gradients = self._capture_backward(hidden, gradient)
                fisher = self._per_layer(
                    "fisher", {"menu": menu}, frobenius=frobenius, hidden=hidden, gradient=gradients
                )
            if "sequence_fisher" in self._needs:
                gradients = self._capture_draws(hidden, last)
                sequence_fisher = self._per_layer(
                    "sequence-fisher", {"menu": menu}, frobenius=frobenius, hidden=hidden, gradient=gradients
                )
            if "divergence" in self._needs:
                alone = {"specs": self._kl_specs(), "sequences": measure.kl_sequences}
                lasts = [last] * len(hidden)
                divergence = self._per_layer("module-divergence", alone, frobenius=frobenius, hidden=hidden, last=lasts)
        outliers = None
        if kurtosis or sensitivity:
            signals = {"kurtosis": kurtosis, "sensitivity": sensitivity}
            outliers = self._add("outliers", "", {}, {name: nodes for name, nodes in signals.items() if nodes})
        return Measurements(
            frobenius=frobenius,
            kurtosis=kurtosis,
            sensitivity=sensitivity,
            fisher=fisher,
            sequence_fisher=sequence_fisher,
            divergence=divergence,
            outliers=outliers,
            trials=trials,
        )

    def _capture_forward(self) -> tuple[list[Node], Node, Node]:
        """States entering every block, states leaving the last one, and the calibration tokens."""
        calibration = self._config.calibration
        sizes = _sizes(calibration, calibration.sequences)
        tokens = self._tokens("calibration", calibration, sizes)
        keep = sizes["tokens"] * self._model.structure.hidden_size * FLOAT32_BYTES
        hidden = [self._add("embed", "", {}, {"tokens": tokens}, expected_bytes=keep)]
        for layer in range(self._model.structure.layers):
            inputs = {"hidden": hidden[-1]}
            node = self._add("forward", f"layer {layer}", {"layer": layer}, inputs, expected_bytes=keep)
            hidden.append(node)
        return hidden[:-1], hidden[-1], tokens

    def _kl_specs(self) -> list[str]:
        given = self._config.measure.kl_specs
        return list(given) if given else [spec.name for spec in default_specs(self._model.menu)]

    def _validation_tokens(self) -> Node:
        """Sequences of the calibration text after those that are measured on."""
        calibration = self._config.calibration
        sizes = _sizes(calibration, calibration.validation_sequences)
        return self._tokens("calibration", calibration, {**sizes, "skipped": calibration.sequences}, "validation")

    def _capture_draws(self, hidden: list[Node], last: Node) -> list[Node]:
        """Gradients at every block's output for labels that the model draws."""
        draws = self._config.measure.label_draws
        config = {"draws": draws, "seed": self._config.calibration.seed}
        keep = draws * (last.expected_bytes or 0)
        gradient = self._add("sampled-loss-gradient", "", config, {"hidden": last}, expected_bytes=keep)
        return self._capture_backward(hidden, gradient, "sampled-backward")

    def _capture_backward(self, hidden: list[Node], gradient: Node, stage: str = "backward") -> list[Node]:
        """Gradient at every block's output, from the one at the last block's."""
        gradients = [gradient]
        for layer in range(self._model.structure.layers - 1, 0, -1):
            inputs = {"hidden": hidden[layer], "gradient": gradients[-1]}
            config = {"layer": layer}
            node = self._add(stage, f"layer {layer}", config, inputs, expected_bytes=gradient.expected_bytes)
            gradients.append(node)
        return gradients[::-1]

    def variants(self) -> list[Variant]:
        """Full precision, then every strategy at every budget."""
        evaluation = self._config.evaluation
        tokens = self._tokens("evaluation-tokens", evaluation, {"tokens": evaluation.tokens})
        windows = {"window": evaluation.window, "stride": evaluation.stride}
        seen = (1 + max(0, evaluation.tokens - evaluation.window) // evaluation.stride) * evaluation.window
        keep = seen * self._model.structure.hidden_size * FLOAT32_BYTES
        reference = self._add("reference", FULL_PRECISION, windows, {"tokens": tokens}, expected_bytes=keep)
        found = [Variant(model=self._model, strategy=None, budget=None, budget_bytes=None, evaluation=reference)]
        for text, budget_bytes in resolve_budgets(self._config, self._model).items():
            for item in self._config.strategies:
                variant = Variant(model=self._model, strategy=item, budget=text, budget_bytes=budget_bytes)
                self._add_variant(variant, tokens, reference, windows)
                found.append(variant)
        return found

    def _add_variant(self, variant: Variant, tokens: Node, reference: Node, windows: dict[str, int]) -> None:
        assert variant.strategy is not None
        what = f"{variant.strategy.label} @ {variant.budget}"
        label = variant.label
        chosen = strategy(variant.strategy.name, **variant.strategy.options)
        needs = chosen.needs
        config = {
            "strategy": variant.strategy.name,
            "options": variant.strategy.options,
            "budget_bytes": variant.budget_bytes,
            "menu": [spec.name for spec in self._model.menu],
        }
        if self._config.constraints.plain and chosen.keeps_constraints:
            config["constraints"] = self._config.constraints.plain
        inputs: dict[str, Input | list[Input]] = {
            need: list(getattr(self.measurements, need)) for need in sorted(needs - {"trials"})
        }
        stage = "allocate"
        if "trials" in needs:
            stage = "refine"
            inputs |= self.measurements.trials
        variant.allocation = self._add(stage, what, config, inputs, variant=label)
        for layer, frobenius in enumerate(self.measurements.frobenius):
            choice = FileOf(variant.allocation, layer_choice_file(layer))
            inputs = {"choice": choice, "frobenius": frobenius}
            expected = (variant.budget_bytes or 0) // self._model.structure.layers
            node = self._add(
                "quantize", f"{what} layer {layer}", {"layer": layer}, inputs, expected_bytes=expected, variant=label
            )
            variant.quantized.append(node)
        choice = FileOf(variant.allocation, "choice.json")
        variant.checkpoint = self._add(
            "checkpoint",
            what,
            {"quantizer": {"name": self._config.measure.quantizer, "axis": self._config.measure.axis}},
            {"choice": choice, "quantized": list(variant.quantized)},
            expected_bytes=self._model.structure.other_bytes,
            variant=label,
        )
        inputs = {"tokens": tokens, "reference": reference, "checkpoint": variant.checkpoint}
        variant.evaluation = self._add("evaluate", what, windows, inputs, variant=label)

    def _grid_bytes(self, specs: list[QuantSpec]) -> int:
        """Bytes of the grids of one layer: all that a stored matrix has but its codes."""
        modules = self._model.structure.in_layer(0)
        sizes = [spec.size_bytes(m.parameters) - m.parameters * spec.bits // 8 for spec in specs for m in modules]
        return sum(sizes)


def _sizes(calibration: CalibrationConfig, sequences: int) -> dict[str, int]:
    return {
        "tokens": sequences * calibration.sequence_length,
        "sequences": sequences,
        "sequence_length": calibration.sequence_length,
    }


def layer_choice_file(layer: int) -> str:
    """File of an allocation that holds one layer's choice."""
    return f"layer-{layer:03d}.json"
