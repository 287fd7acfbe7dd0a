"""Which stage feeds which: the graph of a run, from models, strategies and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lmq.allocation.budget import Budget, check_feasible, module_sizes
from lmq.allocation.solver import check_feasible_program
from lmq.allocation.strategies import TRIALS, strategy
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.activation import SENSITIVITY
from lmq.measurement.base import Need
from lmq.measurement.delta_loss import DELTA_LOSS
from lmq.measurement.expert_tokens import EXPERT_TOKENS
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.module_divergence import default_specs
from lmq.measurement.registry import MEASUREMENTS, PROFILES
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.model.structure import EMBEDDINGS
from lmq.quantizers import CalibratedQuantizer
from lmq.quantizers import quantizer as quantizer_named
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import BaselineConfig, LearnedRoundingConfig, PolishConfig, StrategyConfig
from lmq_flows.graph.judging import PERFORMANCE_TOKENS, Subject, baseline_subject, evaluation_tasks
from lmq_flows.graph.model_nodes import (
    CapturedText,
    ModelNodes,
    PreparedModel,
    TextIdentity,
)
from lmq_flows.graph.node import FileOf, Graph, Input, Node
from lmq_tasks.allocate import ALLOCATION_FILE, layer_file
from lmq_tasks.tuning import tuned_grids_file

FULL_PRECISION = "full-precision"
POLISH_STEPS_PER_NODE = 10
"""What is lost at most when a run is stopped."""


@dataclass(kw_only=True)
class Variant:
    """A model × strategy × budget with the nodes that make and judge it; full precision has no allocation.

    A baseline stands in the place of strategy and budget. `quantizer` made its codes. `tasks` are zero-shot tasks by
    name.
    `error` says why there are no nodes: the budget cannot be met, or the model cannot be used.
    """

    model: str
    strategy: StrategyConfig | None = None
    budget: str | None = None
    budget_bytes: int | None = None
    quantizer: str | None = None
    error: str | None = None
    allocation: Node | None = None
    learned: Node | None = None
    polished: Node | None = None
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


@dataclass(kw_only=True)
class MeasuredModel:
    """Nodes that measure one model and one quantizer's codes: those of every table by name, and the outlier layers.

    A table has one node per layer, that of `delta_loss` one per configuration. Grids, Frobenius errors and
    sequence-wise Fisher costs have one more where the embeddings are quantized. `trials` are inputs of the stage that
    tries allocations on the model, beside the tables of its candidates.
    """

    tables: dict[str, list[Node]]
    outliers: Node | None = None
    trials: dict[str, Input | list[Input]] = field(default_factory=dict)

    @property
    def grids(self) -> list[Node]:
        """Grids of every layer, whose stage measures their Frobenius errors."""
        return self.tables[FROBENIUS.name]


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
        budget_bytes = Budget.parse(text).resolve(model.structure, config.engine)
        what = f"the budget {text!r} of model {model.config.name}"
        check_feasible(budget_bytes, model.structure, model.menu, target=config.engine, what=what)
        if config.kept_constraints.plain:
            modules = model.structure.quantized
            constraints = config.kept_constraints.parsed().compile(modules, model.menu)
            check_feasible_program(module_sizes(modules, model.menu, config.engine), budget_bytes, constraints)
    except InputError as error:
        return error
    return budget_bytes


def failed_variants(config: RunConfig, model: str, error: str) -> list[Variant]:
    """The variants of a model that cannot be used."""
    found = [Variant(model=model, error=error)]
    for text in config.budgets:
        for item in config.variants_of_strategies:
            quantizer = config.quantizer_of(item)["name"]
            found.append(Variant(model=model, strategy=item, budget=text, quantizer=quantizer, error=error))
    found += [Variant(model=model, baseline=item, error=error) for item in config.baselines_of(model)]
    return found


def build_graph(
    config: RunConfig, models: list[PreparedModel], texts: dict[str, TextIdentity]
) -> tuple[Graph, list[Variant], dict[str, MeasuredModel]]:
    """The graph of a whole run; measurements are made once per model and shared by its variants."""
    graph = Graph()
    variants: list[Variant] = []
    measured: dict[str, MeasuredModel] = {}
    for model in models:
        builder = _ModelGraph(graph, config, model, texts)
        measured[model.config.name] = builder.measured
        variants += builder.variants()
    return graph, variants, measured


class _ModelGraph(ModelNodes):
    """Adds the nodes of one model to a graph."""

    def __init__(self, graph: Graph, config: RunConfig, model: PreparedModel, texts: dict[str, TextIdentity]):
        super().__init__(graph, model, texts)
        self._config = config
        measure = config.measure
        every_token = measure.expert_tokens == "all"
        self._captured = CapturedText(self, config.calibration, measure.label_draws, every_token=every_token)
        self._of_any_codes: dict[str, list[Node]] = {}
        self._validation: Node | None = None
        self._polished_on: tuple[Node, Node] | None = None
        self._by_quantizer = [(each, self._measure(each)) for each in config.used_quantizers]

    @property
    def measured(self) -> MeasuredModel:
        """What is measured of the first quantizer's codes: what reports show."""
        return self._by_quantizer[0][1]

    def _measure(self, quantizer: dict[str, Any]) -> MeasuredModel:
        settings, captured, needs = self._settings(), self._captured, self._needs(quantizer)
        also = {QuantSpec.parse(settings["spec"])} if SENSITIVITY.name in needs else set()
        specs = sorted({*self.model.menu, *also}, key=lambda spec: spec.bits_per_weight)
        what = quantizer["name"] if len(self._config.used_quantizers) > 1 else ""
        grids = self.grids(specs, quantizer, captured, what)
        around = self.embedding_grids(specs, quantizer, captured, what)
        measured = MeasuredModel(tables={FROBENIUS.name: grids + around})
        for name, measurement in MEASUREMENTS.items():
            if name not in needs or name in measured.tables:
                continue
            if Need.GRIDS in measurement.needs or measurement is DELTA_LOSS:
                measured.tables[name] = self.measurement(measurement, settings, grids, captured, what)
            else:
                if name not in self._of_any_codes:
                    self._of_any_codes[name] = self.measurement(measurement, settings, grids, captured)
                measured.tables[name] = self._of_any_codes[name]
        if around and SEQUENCE_FISHER.name in measured.tables:
            measured.tables[SEQUENCE_FISHER.name] += self.embedding_fisher(settings["menu"], around[0], captured, what)
        profiles = {name: measured.tables[name] for name in PROFILES if name in measured.tables}
        if profiles:
            measured.outliers = self.add("outliers", what, {}, profiles)
        if TRIALS in needs:
            validation = self._validation_tokens()
            measured.trials = {
                "tokens": captured.tokens,
                "hidden": captured.last,
                "validation": validation,
                "grids": list(grids),
            }
        return measured

    def _needs(self, quantizer: dict[str, Any]) -> set[str]:
        """What is measured for the strategies; beside whatever looks at experts, how many tokens each of them saw."""
        needs = set(self._config.needs_with(quantizer))
        calibrated = isinstance(quantizer_named(**quantizer), CalibratedQuantizer)
        on_text = any(MEASUREMENTS[name].on_text for name in needs if name in MEASUREMENTS)
        if self.model.structure.has_experts and (calibrated or on_text):
            needs.add(EXPERT_TOKENS.name)
        return needs

    def _settings(self) -> dict[str, Any]:
        """What stages that measure can be told, by the names in `Measurement.settings`."""
        measure, menu = self._config.measure, self.model.menu
        specs = list(measure.kl_specs) if measure.kl_specs else [spec.name for spec in default_specs(menu)]
        return {
            "menu": [spec.name for spec in menu],
            "spec": measure.sensitivity_spec,
            "specs": specs,
            "sequences": measure.kl_sequences,
        }

    @property
    def _measured_examples(self) -> int:
        """Sequences or images that are measured on."""
        return self._config.images.calibration if self.model.images else self._config.calibration.sequences

    def _validation_tokens(self) -> Node:
        """Sequences of the calibration text, or images, after those measured on; the same for all that asks."""
        if self._validation is None:
            calibration = self._config.calibration
            count = calibration.validation_sequences
            self._validation = self.calibration_examples(calibration, count, self._measured_examples, "validation")
        return self._validation

    def _tuned(self, variant: Variant, grids: list[Input], integer_zeros: bool) -> list[Input]:
        """Grids of every layer after what the run tunes them with, one after the other; the measured ones first."""
        learned_rounding, polish = self._config.learned_rounding, self._config.polish
        if learned_rounding is not None:
            variant.learned = self._learned(learned_rounding, variant, grids, integer_zeros)
            grids = self._tuned_grids(variant.learned)
        if polish is not None:
            variant.polished = self._polish(polish, variant, grids, integer_zeros)
            grids = self._tuned_grids(variant.polished)
        return grids

    def _tuned_grids(self, node: Node) -> list[Input]:
        return [FileOf(node, tuned_grids_file(layer)) for layer in range(self.model.structure.layers)]

    def _learned(
        self, learned_rounding: LearnedRoundingConfig, variant: Variant, grids: list[Input], integer_zeros: bool
    ) -> Node:
        """The grids of an allocation with learned rounding, every layer by itself, where that helps the model."""
        assert variant.allocation is not None
        what, own = variant.what, {"variant": variant.label}
        schedule = learned_rounding.model_dump() | {"integer_zeros": integer_zeros}
        nodes: list[Input] = []
        for layer, of_layer in enumerate(grids):
            inputs: dict[str, Input | list[Input]] = {
                "allocation": FileOf(variant.allocation, layer_file(layer)),
                "grids": of_layer,
                "hidden": self._captured.entering[layer],
                "leaving": self._captured.leaving[layer],
                Need.DRAWN_GRADIENTS.value: self._captured.drawn_gradients[layer],
            }
            config = {"schedule": schedule}
            nodes.append(self.add_layer("learned-rounding", layer, config, inputs, what=what, **own))
        inputs = {"allocation": FileOf(variant.allocation, ALLOCATION_FILE), "grids": list(grids), "learned": nodes}
        return self.add("learned", what, {}, inputs | {"validation": self._validation_tokens()}, **own)

    def _polish(self, polish: PolishConfig, variant: Variant, grids: list[Input], integer_zeros: bool) -> Node:
        """The grids of an allocation, polished some steps a node, so that a run that was stopped goes on between."""
        assert variant.allocation is not None
        what, own = variant.what, {"variant": variant.label}
        schedule = polish.model_dump(exclude={"sequences"}) | {"integer_zeros": integer_zeros}
        chosen: dict[str, Input | list[Input]] = {"allocation": FileOf(variant.allocation, ALLOCATION_FILE)}
        tokens, hidden = self._polish_text(polish)
        state: dict[str, Input | list[Input]] = {"grids": list(grids)}
        for first in range(0, polish.steps, POLISH_STEPS_PER_NODE):
            last = min(first + POLISH_STEPS_PER_NODE, polish.steps)
            config = {"schedule": schedule, "first": first, "last": last}
            inputs = {**chosen, **state, "tokens": tokens, "hidden": hidden}
            node = self.add("polish", f"{what} steps {first + 1} to {last}", config, inputs, **own)
            state = {"state": node}
        inputs = {**chosen, **state, "grids": list(grids), "validation": self._validation_tokens()}
        return self.add("polished", what, {"schedule": schedule}, inputs, **own)

    def _polish_text(self, polish: PolishConfig) -> tuple[Node, Node]:
        """Tokens that grids are polished on, and the unquantized model's last states there; the same for all."""
        if self._polished_on is None:
            calibration = self._config.calibration
            skipped = self._measured_examples + calibration.validation_sequences
            tokens = self.calibration_examples(calibration, polish.sequences, skipped, "polish")
            keep = self.state_bytes(polish.sequences * calibration.sequence_length)
            self._polished_on = tokens, self.add("last-states", "polish", {}, {"tokens": tokens}, expected_bytes=keep)
        return self._polished_on

    def variants(self) -> list[Variant]:
        """Full precision, then every strategy at every budget."""
        evaluation = self._config.evaluation
        tokens = self.evaluation_examples(evaluation)
        windows = {} if self.model.images else {"window": evaluation.window, "stride": evaluation.stride}
        seen = (1 + max(0, evaluation.tokens - evaluation.window) // evaluation.stride) * evaluation.window
        keep = self.state_bytes(seen)
        shown: dict[str, Input | list[Input]] = {"tokens": tokens}
        if len(self.model.structure.judged_towers) > 1:
            shown["prompts"] = self.prompts(1)
        if self.model.images and self.model.images.config.probe:
            shown["probe"] = self.probe_images(self.model.images)
        reference = self.add(self.judging("reference"), FULL_PRECISION, windows, shown, expected_bytes=keep)
        shown = {**shown, "reference": reference}
        name = self.model.config.name
        found = [Variant(model=name, evaluation=reference)]
        self._judge(found[0], Subject())
        for text, budget in resolve_budgets(self._config, self.model).items():
            for item in self._config.variants_of_strategies:
                quantizer = self._config.quantizer_of(item)
                variant = Variant(model=name, strategy=item, budget=text, quantizer=quantizer["name"])
                if isinstance(budget, InputError):
                    variant.error = str(budget)
                else:
                    variant.budget_bytes = budget
                    self._add_variant(variant, quantizer, shown, windows)
                found.append(variant)
        for baseline in self._config.baselines_of(name):
            found.append(self._baseline(baseline, shown, windows))
        return found

    def _baseline(self, baseline: BaselineConfig, inputs: dict[str, Any], windows: dict[str, int]) -> Variant:
        """A baseline with its evaluation, or with what is wrong with its files."""
        variant = Variant(model=self.model.config.name, baseline=baseline)
        try:
            subject = baseline_subject(baseline, self.model.site.store_url)
            if subject.opens and self.model.images is not None:
                raise InputError(f"baseline {baseline.name!r}: checkpoints of other programs are judged on texts alone")
        except InputError as error:
            variant.error = str(error)
            return variant
        stage = "evaluate-other" if subject.opens else self.judging("evaluate-rounded")
        site = replace(self.model.site, places=subject.places)
        own: dict[str, Any] = {"variant": variant.label, "site": site}
        variant.evaluation = self.add(stage, variant.what, subject.config | windows, inputs, **own)
        self._judge(variant, subject)
        return variant

    def _judge(self, variant: Variant, subject: Subject) -> None:
        """Add what is measured of a variant beside its perplexity."""
        own: dict[str, Any] = {"variant": variant.label}
        if self._config.evaluation.performance and subject.opens:
            site = replace(self.model.site, places=subject.places)
            config = PERFORMANCE_TOKENS | subject.config
            variant.performance = self.add("performance", variant.what, config, subject.inputs, site=site, **own)
        for task in evaluation_tasks(self._config.evaluation):
            site = replace(self.model.site, places=subject.places | task.places)
            what, config = f"{variant.what} {task.name}", task.config | subject.config
            variant.tasks[task.name] = self.add("zero-shot", what, config, subject.inputs, site=site, **own)

    def _add_variant(
        self,
        variant: Variant,
        quantizer: dict[str, Any],
        shown: dict[str, Input | list[Input]],
        windows: dict[str, int],
    ) -> None:
        assert variant.strategy is not None
        (measured,) = (measured for each, measured in self._by_quantizer if each == quantizer)
        what = f"{variant.strategy.label} @ {variant.budget}"
        own: dict[str, Any] = {"variant": variant.label}
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
        engine = self._config.engine
        if engine is not None and engine.bits:  # types alone take the same bytes everywhere
            config["target"] = engine.name
        inputs: dict[str, Input | list[Input]] = {
            need: list(measured.tables[need]) for need in sorted(needs - {TRIALS})
        }
        stage = "allocate"
        if TRIALS in needs:
            stage = "refine"
            inputs |= measured.trials
        variant.allocation = self.add(stage, what, config, inputs, **own)
        layers = self.model.structure.layers
        of_layers: list[Input] = list(measured.grids[:layers])
        if self._config.tunes(variant.strategy):
            of_layers = self._tuned(variant, of_layers, bool(quantizer.get("integer_zeros")))
        for layer, grids in enumerate(of_layers):
            inputs = {"allocation": FileOf(variant.allocation, layer_file(layer)), "grids": grids}
            expected = (variant.budget_bytes or 0) // layers
            node = self.add_layer("quantize", layer, {}, inputs, what=what, expected_bytes=expected, **own)
            variant.quantized.append(node)
        for grids in measured.grids[layers:]:
            inputs = {"allocation": FileOf(variant.allocation, layer_file(EMBEDDINGS)), "grids": grids}
            node = self.add("quantize", f"{what} embeddings", {"layer": EMBEDDINGS}, inputs, **own)
            variant.quantized.append(node)
        variant.checkpoint = self.add(
            "checkpoint",
            what,
            {"quantizer": quantizer},
            {"allocation": FileOf(variant.allocation, ALLOCATION_FILE), "quantized": list(variant.quantized)},
            expected_bytes=self.model.structure.other_bytes,
            **own,
        )
        inputs = {**shown, "checkpoint": variant.checkpoint}
        variant.evaluation = self.add(self.judging("evaluate"), what, windows, inputs, **own)
        self._judge(variant, Subject(inputs={"checkpoint": variant.checkpoint}))
