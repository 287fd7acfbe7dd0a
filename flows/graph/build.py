"""Which stage feeds which: the graph of a run, from models, strategies and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lmq.allocation.budget import Budget, check_feasible, module_sizes
from lmq.allocation.solver import check_feasible_program
from lmq.allocation.strategies import strategy
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.divergence import default_specs
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import BaselineConfig, StrategyConfig
from lmq_flows.graph.judging import PERFORMANCE_TOKENS, Subject, baseline_subject, evaluation_tasks
from lmq_flows.graph.model_nodes import FLOAT32_BYTES, ModelNodes, PreparedModel, TextIdentity, calibration_sizes
from lmq_flows.graph.node import FileOf, Graph, Input, Node

FULL_PRECISION = "full-precision"


@dataclass(kw_only=True)
class Variant:
    """A model × strategy × budget with the nodes that make and judge it; full precision has no allocation.

    A baseline stands in the place of strategy and budget. `tasks` are zero-shot tasks by name.
    `error` says why there are no nodes: the budget cannot be met, or the model cannot be used.
    """

    model: str
    strategy: StrategyConfig | None = None
    budget: str | None = None
    budget_bytes: int | None = None
    error: str | None = None
    allocation: Node | None = None
    checkpoint: Node | None = None
    evaluation: Node | None = None
    quantized: list[Node] = field(default_factory=list)
    baseline: BaselineConfig | None = None
    performance: Node | None = None
    tasks: dict[str, Node] = field(default_factory=dict)

    @property
    def strategy_label(self) -> str:
        """Name of the strategy with its options, of the baseline, or full-precision."""
        chosen = self.strategy or self.baseline
        return FULL_PRECISION if chosen is None else chosen.label

    @property
    def what(self) -> str:
        """`loss-aware @ uniform b4g64`."""
        return self.strategy_label if self.budget is None else f"{self.strategy_label} @ {self.budget}"

    @property
    def label(self) -> str:
        """`smollm2 loss-aware @ uniform b4g64`."""
        return f"{self.model} {self.what}"

    @property
    def tags(self) -> tuple[str, ...]:
        """What finds the variant's tasks in the UI."""
        chosen = () if self.strategy_label == FULL_PRECISION else (f"strategy:{self.strategy_label}",)
        budget = () if self.budget is None else (f"budget:{self.budget}",)
        return (f"model:{self.model}", *chosen, *budget)


@dataclass(kw_only=True)
class Measurements:
    """Nodes that measure one model; an empty list and None were not asked for.

    A list has one node per layer, `delta_loss` one per configuration.
    """

    frobenius: list[Node]
    kurtosis: list[Node] = field(default_factory=list)
    sensitivity: list[Node] = field(default_factory=list)
    fisher: list[Node] = field(default_factory=list)
    sequence_fisher: list[Node] = field(default_factory=list)
    divergence: list[Node] = field(default_factory=list)
    module_errors: list[Node] = field(default_factory=list)
    delta_loss: list[Node] = field(default_factory=list)
    super_weights: list[Node] = field(default_factory=list)
    layer_importance: list[Node] = field(default_factory=list)
    outliers: Node | None = None
    trials: dict[str, Input | list[Input]] = field(default_factory=dict)
    """Inputs of the stage that tries plans on the model, beside the tables of its candidates."""


def resolve_budgets(config: RunConfig, model: PreparedModel) -> dict[str, int | InputError]:
    """Bytes of every budget for a model, or why it cannot be met; before anything is measured.

    Raises InfeasibleBudget or InputError when not one of them can.
    """
    budgets = {text: _resolved(config, model, text) for text in config.budgets}
    problems = [found for found in budgets.values() if isinstance(found, InputError)]
    if len(problems) == len(budgets):
        raise problems[0]
    return budgets


def _resolved(config: RunConfig, model: PreparedModel, text: str) -> int | InputError:
    try:
        budget_bytes = Budget.parse(text).resolve(model.structure)
        what = f"the budget {text!r} of model {model.config.name}"
        check_feasible(budget_bytes, model.structure, model.menu, what=what)
        if config.kept_constraints.plain:
            modules = model.structure.modules
            constraints = config.kept_constraints.parsed().compile(modules, model.menu)
            check_feasible_program(module_sizes(modules, model.menu), budget_bytes, constraints)
    except InputError as error:
        return error
    return budget_bytes


def failed_variants(config: RunConfig, model: str, error: str) -> list[Variant]:
    """The variants of a model that cannot be used."""
    found = [Variant(model=model, error=error)]
    for text in config.budgets:
        found += [Variant(model=model, strategy=item, budget=text, error=error) for item in config.strategies]
    found += [Variant(model=model, baseline=item, error=error) for item in config.baselines_of(model)]
    return found


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


class _ModelGraph(ModelNodes):
    """Adds the nodes of one model to a graph."""

    def __init__(self, graph: Graph, config: RunConfig, model: PreparedModel, texts: dict[str, TextIdentity]):
        super().__init__(graph, model, texts)
        self._config = config
        self._needs = config.needs
        self.measurements = self._measure()

    def _measure(self) -> Measurements:
        measure = self._config.measure
        also = {QuantSpec.parse(measure.sensitivity_spec)} if "sensitivity" in self._needs else set()
        specs = sorted({*self.model.menu, *also}, key=lambda spec: spec.bits_per_weight)
        found = Measurements(frobenius=self.frobenius(specs, self._config.quantizer))
        if "kurtosis" in self._needs:
            found.kurtosis = self.per_layer("kurtosis", {})
        if self._config.needs_calibration:
            self._measure_on_text(found)
        if found.kurtosis or found.sensitivity:
            signals = {"kurtosis": found.kurtosis, "sensitivity": found.sensitivity}
            found.outliers = self.add("outliers", "", {}, {name: nodes for name, nodes in signals.items() if nodes})
        return found

    def _measure_on_text(self, found: Measurements) -> None:
        """Add what is measured on the calibration text."""
        measure, calibration = self._config.measure, self._config.calibration
        hidden, last, tokens = self.capture_forward(calibration)
        menu = {"menu": [spec.name for spec in self.model.menu]}
        replayed: dict[str, Any] = {"frobenius": found.frobenius, "hidden": hidden}
        if "trials" in self._needs:
            found.trials = {"tokens": tokens, "hidden": last, "validation": self._validation_tokens()}
        if "sensitivity" in self._needs:
            found.sensitivity = self.per_layer("sensitivity", {"spec": measure.sensitivity_spec}, **replayed)
        if self._needs & {"fisher", "module_errors"}:
            gradients = self.capture_text_gradient(hidden, last, tokens)
            if "fisher" in self._needs:
                found.fisher = self.per_layer("fisher", menu, **replayed, gradient=gradients)
            if "module_errors" in self._needs:
                found.module_errors = self.per_layer("module-errors", menu, **replayed, gradient=gradients)
        if "sequence_fisher" in self._needs:
            gradients = self.capture_draws(hidden, last, measure.label_draws, calibration.seed)
            found.sequence_fisher = self.per_layer("sequence-fisher", menu, **replayed, gradient=gradients)
        if "divergence" in self._needs:
            alone = {"specs": self._kl_specs(), "sequences": measure.kl_sequences}
            found.divergence = self.per_layer("module-divergence", alone, **replayed, last=[last] * len(hidden))
        if "delta_loss" in self._needs:
            found.delta_loss = self.delta_loss(self.model.menu, found.frobenius, tokens)
        if "super_weights" in self._needs:
            found.super_weights = self.per_layer("super-weights", {}, hidden=hidden)
        if "layer_importance" in self._needs:
            found.layer_importance = self.layer_activity(hidden, last)

    def _kl_specs(self) -> list[str]:
        given = self._config.measure.kl_specs
        return list(given) if given else [spec.name for spec in default_specs(self.model.menu)]

    def _validation_tokens(self) -> Node:
        """Sequences of the calibration text after those that are measured on."""
        calibration = self._config.calibration
        sizes = calibration_sizes(calibration, calibration.validation_sequences)
        return self.tokens("calibration", calibration, {**sizes, "skipped": calibration.sequences}, "validation")

    def variants(self) -> list[Variant]:
        """Full precision, then every strategy at every budget."""
        evaluation = self._config.evaluation
        tokens = self.tokens("evaluation-tokens", evaluation, {"tokens": evaluation.tokens})
        windows = {"window": evaluation.window, "stride": evaluation.stride}
        seen = (1 + max(0, evaluation.tokens - evaluation.window) // evaluation.stride) * evaluation.window
        keep = seen * self.model.structure.hidden_size * FLOAT32_BYTES
        reference = self.add("reference", FULL_PRECISION, windows, {"tokens": tokens}, expected_bytes=keep)
        name = self.model.config.name
        found = [Variant(model=name, evaluation=reference)]
        self._judge(found[0], Subject())
        for text, budget in resolve_budgets(self._config, self.model).items():
            for item in self._config.strategies:
                variant = Variant(model=name, strategy=item, budget=text)
                if isinstance(budget, InputError):
                    variant.error = str(budget)
                else:
                    variant.budget_bytes = budget
                    self._add_variant(variant, tokens, reference, windows)
                found.append(variant)
        for baseline in self._config.baselines_of(name):
            found.append(self._baseline(baseline, {"tokens": tokens, "reference": reference}, windows))
        return found

    def _baseline(self, baseline: BaselineConfig, inputs: dict[str, Any], windows: dict[str, int]) -> Variant:
        """A baseline with its evaluation, or with what is wrong with its files."""
        variant = Variant(model=self.model.config.name, baseline=baseline)
        try:
            subject = baseline_subject(baseline, self.model.site.store_url)
        except InputError as error:
            variant.error = str(error)
            return variant
        stage = "evaluate-other" if subject.opens else "evaluate-rounded"
        site = replace(self.model.site, places=subject.places)
        own: dict[str, Any] = {"variant": variant.label, "tags": variant.tags, "site": site}
        variant.evaluation = self.add(stage, variant.what, subject.config | windows, inputs, **own)
        self._judge(variant, subject)
        return variant

    def _judge(self, variant: Variant, subject: Subject) -> None:
        """Add what is measured of a variant beside its perplexity."""
        own: dict[str, Any] = {"variant": variant.label, "tags": variant.tags}
        if self._config.evaluation.performance and subject.opens:
            site = replace(self.model.site, places=subject.places)
            config = PERFORMANCE_TOKENS | subject.config
            variant.performance = self.add("performance", variant.what, config, subject.inputs, site=site, **own)
        for task in evaluation_tasks(self._config.evaluation):
            site = replace(self.model.site, places=subject.places | task.places)
            what, config = f"{variant.what} {task.name}", task.config | subject.config
            variant.tasks[task.name] = self.add("zero-shot", what, config, subject.inputs, site=site, **own)

    def _add_variant(self, variant: Variant, tokens: Node, reference: Node, windows: dict[str, int]) -> None:
        assert variant.strategy is not None
        what = f"{variant.strategy.label} @ {variant.budget}"
        own: dict[str, Any] = {"variant": variant.label, "tags": variant.tags}
        chosen = strategy(variant.strategy.name, **variant.strategy.options)
        needs = chosen.needs
        config = {
            "strategy": variant.strategy.name,
            "options": variant.strategy.options,
            "budget_bytes": variant.budget_bytes,
            "menu": [spec.name for spec in self.model.menu],
        }
        if self._config.kept_constraints.plain and chosen.keeps_constraints:
            config["constraints"] = self._config.kept_constraints.plain
        inputs: dict[str, Input | list[Input]] = {
            need: list(getattr(self.measurements, need)) for need in sorted(needs - {"trials"})
        }
        stage = "allocate"
        if "trials" in needs:
            stage = "refine"
            inputs |= self.measurements.trials
        variant.allocation = self.add(stage, what, config, inputs, **own)
        for layer, frobenius in enumerate(self.measurements.frobenius):
            choice = FileOf(variant.allocation, layer_choice_file(layer))
            inputs = {"choice": choice, "frobenius": frobenius}
            expected = (variant.budget_bytes or 0) // self.model.structure.layers
            node = self.add(
                "quantize", f"{what} layer {layer}", {"layer": layer}, inputs, expected_bytes=expected, **own
            )
            variant.quantized.append(node)
        choice = FileOf(variant.allocation, "choice.json")
        variant.checkpoint = self.add(
            "checkpoint",
            what,
            {"quantizer": self._config.quantizer},
            {"choice": choice, "quantized": list(variant.quantized)},
            expected_bytes=self.model.structure.other_bytes,
            **own,
        )
        inputs = {"tokens": tokens, "reference": reference, "checkpoint": variant.checkpoint}
        variant.evaluation = self.add("evaluate", what, windows, inputs, **own)
        self._judge(variant, Subject(inputs={"checkpoint": variant.checkpoint}))


def layer_choice_file(layer: int) -> str:
    """File of an allocation that holds one layer's choice."""
    return f"layer-{layer:03d}.json"
