"""What is measured of which models on what text; and the whole of a run: strategies, budgets and evaluation too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from lmq.allocation.embeddings import decides_on_embeddings
from lmq.allocation.strategies import STRATEGIES, TRIALS, strategy
from lmq.allocation.strategies.uniform import Uniform
from lmq.allocation.targets import TARGETS, Target, left_out, restrict_menu, taken_instead, target_named, too_new
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.measurement.registry import MEASUREMENTS
from lmq.model.structure import ModuleInfo
from lmq.quantizers import CALIBRATED, QUANTIZERS, CalibratedQuantizer, quantizer
from lmq_flows.config.overrides import apply_override
from lmq_flows.config.problems import problem_texts
from lmq_flows.config.sections import (
    NAME_PATTERN,
    BaselineConfig,
    BudgetText,
    CalibrationConfig,
    ConstraintsConfig,
    EvaluationConfig,
    ImagesConfig,
    LearnedRoundingConfig,
    MeasureConfig,
    ModelConfig,
    PolishConfig,
    QuantizerName,
    RunnerConfig,
    Section,
    StrategyConfig,
    TargetName,
    TextConfig,
    without_repeats,
)
from lmq_storage import BadStore
from lmq_storage.names import checked_url

R = TypeVar("R", bound="MeasurementRequest")


class MeasurementRequest(Section):
    """What is measured: of which models, on what text, by which menu and quantizer; and where work is done."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    calibration: CalibrationConfig = CalibrationConfig()
    images: ImagesConfig = ImagesConfig()
    measure: MeasureConfig = MeasureConfig()
    runner: RunnerConfig = RunnerConfig()
    embeddings: bool = Field(False, description="Quantize the input embedding and the output head too")
    modules: tuple[str, ...] = Field(
        (),
        description='Quantize only these: patterns over LAYER.KIND, as in ["*.mlp.*"], and of paths beside a language '
        'model, as in ["*", "vision_tower.*"]; default: all of the language model',
    )
    store: str = Field("store", min_length=1, description="Where artifacts are kept: a directory or any fsspec URL")

    @field_validator("store")
    @classmethod
    def _store_holds_no_secret(cls, url: str) -> str:
        try:
            return checked_url(url)
        except BadStore as error:
            raise ValueError(str(error)) from error

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        without_repeats(tuple(model.name for model in models))
        return models

    @model_validator(mode="after")
    def _kl_specs_are_on_the_menus(self) -> MeasurementRequest:
        for menu in (model.menu or self.measure.menu for model in self.models):
            missing = [spec for spec in self.measure.kl_specs or () if spec not in menu]
            if missing:
                raise ValueError(f"measure.kl_specs has {missing[0]}, which is not on the menu {', '.join(menu)}")
        return self

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The texts that tokens are drawn from."""
        return (self.calibration,)

    @property
    def quantizer(self) -> dict[str, Any]:
        """Name and options of the quantizer."""
        return self.quantizer_named(self.measure.quantizer)

    def quantizer_named(self, name: str) -> dict[str, Any]:
        """A quantizer with the run's axis; options are those of measure.quantizer."""
        options = self.measure.quantizer_options if name == self.measure.quantizer else {}
        return {"name": name, "axis": self.measure.axis, **options}

    def menu_of(self, model: ModelConfig, modules: Sequence[ModuleInfo]) -> tuple[QuantSpec, ...]:
        """The configurations for a model with these modules, smallest first."""
        return self.whole_menu_of(model)

    def whole_menu_of(self, model: ModelConfig) -> tuple[QuantSpec, ...]:
        """The configurations that the menu of a model names, smallest first."""
        specs = [QuantSpec.parse(name) for name in model.menu or self.measure.menu]
        return tuple(sorted(specs, key=lambda spec: spec.bits_per_weight))

    @property
    def needs(self) -> frozenset[str]:
        """Names of the measurements."""
        return frozenset(self.measure.also)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration text, or the quantizer looks at it."""
        calibrated = any(isinstance(quantizer(**each), CalibratedQuantizer) for each in self.used_quantizers)
        return calibrated or any(name == TRIALS or MEASUREMENTS[name].on_text for name in self.needs)

    @property
    def used_quantizers(self) -> tuple[dict[str, Any], ...]:
        """Every quantizer whose codes are looked at, that of the measurements first."""
        return (self.quantizer,)

    @property
    def calibration_sequences(self) -> int:
        """Sequences taken from the calibration text: those measured on, and those that plans are tried on."""
        validation = self.calibration.validation_sequences if TRIALS in self.needs else 0
        return self.calibration.sequences + validation


class RunConfig(MeasurementRequest):
    """One run: models × strategies × budgets."""

    name: str = Field(pattern=NAME_PATTERN, description="Results go to runs_dir/NAME")
    strategies: tuple[StrategyConfig, ...] = Field(min_length=1)
    quantizers: Annotated[tuple[QuantizerName, ...], AfterValidator(without_repeats)] = Field(
        (), description="Every strategy once with each of these, but for those that name their own"
    )
    budgets: Annotated[tuple[BudgetText, ...], AfterValidator(without_repeats)] = Field(
        min_length=1, description='"4.25" (bits per weight), "80 MB", "uniform b4g64 + 2%"'
    )
    baselines: tuple[BaselineConfig, ...] = Field(
        (), description="Judged beside the variants: rtn b4g64, nf4, or {name, path} of another program's checkpoint"
    )
    target: TargetName | None = Field(
        None, description=f"What will serve the checkpoints: plan within what it holds ({', '.join(TARGETS)})"
    )
    constraints: ConstraintsConfig = ConstraintsConfig()
    learned_rounding: LearnedRoundingConfig | None = Field(
        None, description="Move the codes of every variant but those of the papers' strategies: {steps: 60}"
    )
    polish: PolishConfig | None = Field(
        None, description="Tune scales and zeros of these variants for the whole model, after that: {steps: 60}"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    runs_dir: str = Field("runs", min_length=1, description="Where results are written")

    @field_validator("budgets", mode="before")
    @classmethod
    def _budgets_are_text(cls, value: Any) -> Any:
        return tuple(str(item) for item in value) if isinstance(value, list | tuple) else value

    @field_validator("baselines", "strategies", mode="before")
    @classmethod
    def _strategies_by_name(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @field_validator("strategies")
    @classmethod
    def _strategies_differ(cls, strategies: tuple[StrategyConfig, ...]) -> tuple[StrategyConfig, ...]:
        without_repeats(tuple(item.label for item in strategies))
        return strategies

    @property
    def tuning(self) -> tuple[str, ...]:
        """Keys of what tunes the grids of an allocation."""
        return tuple(key for key in ("learned_rounding", "polish") if getattr(self, key) is not None)

    def tunes(self, item: StrategyConfig) -> bool:
        """Whether the grids of a strategy are tuned; those of the papers are left as published."""
        return bool(self.tuning) and item.tuned and STRATEGIES[item.name].quantizer is None

    @property
    def variants_of_strategies(self) -> tuple[StrategyConfig, ...]:
        """The strategies, each with every quantizer of the run that it is to be tried with."""
        found = [
            item.model_copy(update={"quantizer": name}) if name else item
            for item in self.strategies
            for name in (self.quantizers if item.quantizer is None and self.quantizers else (item.quantizer,))
        ]
        return tuple({item.label: item for item in found}.values())

    def quantizer_of(self, item: StrategyConfig) -> dict[str, Any]:
        """Name and options of the quantizer that makes the codes of a strategy."""
        return self.quantizer_named(item.quantizer or STRATEGIES[item.name].quantizer or self.measure.quantizer)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured or tuned on calibration text, or a quantizer looks at it."""
        return bool(self.tuning) or super().needs_calibration

    @property
    def calibration_sequences(self) -> int:
        """With those that tuned grids are judged and polished on."""
        if not self.tuning:
            return super().calibration_sequences
        polished_on = self.polish.sequences if self.polish is not None else 0
        return self.calibration.sequences + self.calibration.validation_sequences + polished_on

    @property
    def used_quantizers(self) -> tuple[dict[str, Any], ...]:
        """Every quantizer whose codes are looked at: that of the run first, if it is one of them."""
        used = [self.quantizer_of(item) for item in self.variants_of_strategies]
        found = sorted(used, key=lambda each: each != self.quantizer) or [self.quantizer]
        return tuple(each for number, each in enumerate(found) if each not in found[:number])

    @model_validator(mode="after")
    def _baselines_differ(self) -> RunConfig:
        labels = [item.label for item in self.baselines] + [item.label for item in self.strategies]
        without_repeats(tuple(labels))
        names = [model.name for model in self.models]
        for item in self.baselines:
            if item.path is not None and item.model is None and len(names) > 1:
                raise ValueError(f"baseline {item.name!r} needs a key model, one of {', '.join(names)}")
            if item.model is not None and item.model not in names:
                raise ValueError(f"baseline {item.name!r} is of model {item.model!r}; the run has {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _evaluates_on_other_text(self) -> RunConfig:
        calibration, evaluation = self.calibration, self.evaluation
        same = calibration.source == evaluation.source
        apart = {calibration.part, evaluation.part} == {"first", "second"} and calibration.seed == evaluation.seed
        if same and not apart:
            raise ValueError(
                f"calibration and evaluation both draw from {calibration.source!r} and may share documents: "
                "give one part 'first' and the other 'second' with the same seed, or another source"
            )
        return self

    @model_validator(mode="after")
    def _strategies_keep_the_constraints(self) -> RunConfig:
        if not self.kept_constraints.plain:
            return self
        for item in self.strategies:
            if item.name != Uniform.name and not STRATEGIES[item.name].keeps_constraints:
                able = ", ".join(name for name, each in STRATEGIES.items() if each.keeps_constraints)
                of_target = "" if self.constraints.plain else f", such as those of target {self.target!r}"
                raise ValueError(f"strategy {item.label!r} keeps no constraints{of_target}; those that do: {able}")
        return self

    @model_validator(mode="after")
    def _embeddings_go_with_the_rest(self) -> RunConfig:
        if not self.embeddings:
            return self
        if self.measure.axis != 1:
            raise ValueError("embeddings = true takes groups along the hidden dimension; set measure.axis to 1")
        if self.engine is not None and not self.engine.embeddings:
            raise ValueError(f"target {self.target!r} holds no quantized embeddings; leave out target or embeddings")
        if rounding := [item.label for item in self.baselines if item.path is None]:
            raise ValueError(f"baseline {rounding[0]!r} rounds no embeddings; leave out one of both")
        apart = [
            item.label for item in self.strategies if not decides_on_embeddings(strategy(item.name, **item.options))
        ]
        if self.constraints.plain and apart:
            raise ValueError(
                f"strategy {apart[0]!r} keeps no constraints on embeddings; with embeddings = true and constraints "
                "take loss-aware"
            )
        return self

    @model_validator(mode="after")
    def _types_of_gguf_are_found(self) -> RunConfig:
        types = [spec.name for model in self.models for spec in self.whole_menu_of(model) if spec.gguf is not None]
        if not types:
            return self
        if self.measure.axis != 1:
            raise ValueError(f"{types[0]} groups weights along in_features; set measure.axis to 1")
        if self.polish is not None:
            raise ValueError(f"polish tunes scales and zeros of lmq's own grids, not those of {types[0]}; leave it out")
        for item in self.variants_of_strategies:
            name = self.quantizer_of(item)["name"]
            if name not in CALIBRATED:
                raise ValueError(
                    f"strategy {item.label!r} has quantizer {name!r}, which finds no codes of {types[0]}; "
                    f"those that do: {', '.join(CALIBRATED)}"
                )
        return self

    @model_validator(mode="after")
    def _grids_suit_the_target(self) -> RunConfig:
        if self.engine is None:
            return self
        if self.measure.axis != 1:
            raise ValueError(f"target {self.target!r} takes groups along in_features; set measure.axis to 1")
        able = [
            name
            for name, each in QUANTIZERS.items()
            if "integer_zeros" in {field.name for field in fields(each)}  # type: ignore[arg-type]
        ]
        used = {self.measure.quantizer, *self.quantizers} | {
            item.quantizer for item in self.strategies if item.quantizer
        }
        if self.engine.integer_zeros and (unable := sorted(used - {*able})):
            raise ValueError(
                f"target {self.target!r} takes whole zeros, which quantizer {unable[0]!r} does not fit; "
                f"those that do: {', '.join(able)}"
            )
        return self

    def baselines_of(self, model: str) -> list[BaselineConfig]:
        """The baselines that a model is compared with."""
        return [item for item in self.baselines if item.model in (None, model)]

    @property
    def texts(self) -> tuple[TextConfig, ...]:
        """The texts that tokens are drawn from: to measure on, and to judge on."""
        return (self.calibration, self.evaluation)

    @property
    def run_dir(self) -> Path:
        """Where this run's results are written."""
        return Path(self.runs_dir) / self.name

    @property
    def engine(self) -> Target | None:
        """What will serve the checkpoints, where the run names it."""
        return None if self.target is None else target_named(self.target)

    @property
    def kept_constraints(self) -> ConstraintsConfig:
        """The constraints of the run with those of its target."""
        engine = self.engine
        if engine is None:
            return self.constraints
        alike = dict.fromkeys((*self.constraints.alike, *engine.alike))
        most = [most for most in (self.constraints.most_configurations, engine.most_configurations) if most is not None]
        kept = {"alike": tuple(alike), "most_configurations": min(most, default=None)}
        return self.constraints.model_copy(update=kept)

    def quantizer_named(self, name: str) -> dict[str, Any]:
        """A quantizer with the run's axis and what its target needs; options are those of measure.quantizer."""
        zeros = self.engine is not None and self.engine.integer_zeros
        return super().quantizer_named(name) | ({"integer_zeros": zeros} if zeros else {})

    def menu_of(self, model: ModelConfig, modules: Sequence[ModuleInfo]) -> tuple[QuantSpec, ...]:
        """The configurations for a model with these modules, smallest first: those of its menu that the target holds.

        Raises InputError where it holds none of them, or not one of measure.kl_specs.
        """
        menu = self.whole_menu_of(model)
        if self.engine is None:
            return menu
        held = restrict_menu(menu, self.engine, modules)
        names = [spec.name for spec in held]
        if missing := [name for name in self.measure.kl_specs or () if name not in names]:
            raise InputError(
                f"measure.kl_specs has {missing[0]}, which target {self.target!r} does not hold for every module of "
                f"{model.name}; left of its menu: {', '.join(names)}"
            )
        return held

    def whole_menu_of(self, model: ModelConfig) -> tuple[QuantSpec, ...]:
        """The configurations that the menu of a model names, smallest first; without one, those of the target."""
        own = () if self.engine is None else self.engine.menu
        if own and model.menu is None and self.measure.menu == MeasureConfig().menu:
            return tuple(sorted(map(QuantSpec.parse, own), key=lambda spec: spec.bits_per_weight))
        return super().whole_menu_of(model)

    def left_out_of_menu(self, model: ModelConfig, modules: Sequence[ModuleInfo]) -> list[str]:
        """What the target does not hold of the menu of a model with these modules, or as another type: sentences.

        And what the package that opens it, as it is installed here, is too old for.
        """
        menu = self.whole_menu_of(model)
        texts = taken_instead(menu, modules)
        if self.engine is not None:
            too_old_for = too_new(self.menu_of(model, modules), self.engine)
            texts = [*left_out(menu, self.engine, modules), *too_old_for, *texts]
        return [f"{model.name}: {text}" for text in texts]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the measurements that the strategies use, and of those asked for beside."""
        used = (strategy(item.name, **item.options).needs for item in self.strategies)
        return super().needs.union(*used)

    def needs_with(self, quantizer: dict[str, Any]) -> frozenset[str]:
        """Those of them that are needed of one quantizer's codes."""
        used = [item for item in self.variants_of_strategies if self.quantizer_of(item) == quantizer]
        also = super().needs if quantizer == self.used_quantizers[0] else frozenset()
        return also.union(*(strategy(item.name, **item.options).needs for item in used))


_SECTIONS: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "models": ModelConfig,
    "strategies": StrategyConfig,
    "baselines": BaselineConfig,
    "constraints": ConstraintsConfig,
    "learned_rounding": LearnedRoundingConfig,
    "polish": PolishConfig,
    "calibration": CalibrationConfig,
    "images": ImagesConfig,
    "measure": MeasureConfig,
    "evaluation": EvaluationConfig,
    "runner": RunnerConfig,
}
"""What each section of the file is read as, by its first key."""


def load_run_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML run configuration, with `a.b=value` overrides. Raises InputError naming what is wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"there is no configuration file {path}; presets: {', '.join(preset_names())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a YAML file") from error
    if not isinstance(data, dict):
        what = "nothing" if data is None else f"one {type(data).__name__}"
        raise InputError(f"{path} holds {what}, not the keys of a run configuration: name, models, strategies, ...")
    for override in overrides:
        apply_override(data, override)
    return parse_run_config(data)


def parse_run_config(data: dict[str, Any]) -> RunConfig:
    """Check a configuration given as plain values. Raises InputError naming every problem."""
    return parse_request(RunConfig, data)


def parse_request(kind: type[R], data: dict[str, Any]) -> R:
    """Check a request to measure, or a whole run, given as plain values. Raises InputError naming every problem."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError("; ".join(problem_texts(error, _SECTIONS))) from error


def preset_path(name: str) -> Path:
    """Path of a preset that comes with lmq (`demo`)."""
    return _presets_dir() / f"{name}.yaml"


def preset_names() -> list[str]:
    """Names of the presets that come with lmq."""
    return sorted(path.stem for path in _presets_dir().glob("*.yaml"))


def _presets_dir() -> Path:
    checkout = Path(__file__).parents[2] / "deployments" / "presets"
    return checkout if checkout.is_dir() else Path(__file__).parents[1] / "presets"
