"""The configuration of a run: which models, strategies and budgets, measured and judged on what text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lmq.budget import Budget
from lmq.constraints import Constraints
from lmq.constraints_text import parse_constraints
from lmq.errors import InputError, unknown_name
from lmq.quant_spec import STOPS, QuantSpec
from lmq.strategies import STRATEGIES, strategy
from lmq.strategies.uniform import Uniform
from lmq_flows.config_problems import problem_texts
from lmq_flows.names import slug
from lmq_flows.overrides import apply_override

T = TypeVar("T")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _checked(check: Callable[[], T]) -> T:
    """Result of a check, its InputError as the ValueError that pydantic collects together with the key."""
    try:
        return check()
    except InputError as error:
        raise ValueError(str(error)) from error


def _spec_name(text: str) -> str:
    return _checked(lambda: QuantSpec.parse(text)).name


def _budget_text(text: str) -> str:
    _checked(lambda: Budget.parse(text))
    return text


def _without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    slugs = [slug(name) for name in names]
    for index, name in enumerate(names):
        if slugs[index] in slugs[:index]:
            raise ValueError(f"{name!r} is listed twice (letters count the same in upper and lower case)")
    return names


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SpecName = Annotated[str, AfterValidator(_spec_name)]
Menu = Annotated[tuple[SpecName, ...], Field(min_length=1), AfterValidator(_without_repeats)]
BudgetText = Annotated[str, AfterValidator(_budget_text)]


class ModelConfig(_Section):
    """A model to quantize."""

    name: str = Field(pattern=NAME_PATTERN, description="Short name used in tables and paths")
    source: str = Field(min_length=1, description="Hub id, directory, .gguf file, or package:NAME/FILE")
    sha256: str | None = Field(None, description="Expected sha256 of a single-file source")
    dtype: Literal["exact", "float16", "bfloat16"] = Field(
        default="exact", description="What a GGUF file is converted to; exact: the smallest type that holds every value"
    )
    menu: Menu | None = Field(None, description="Menu of this model; default: measure.menu")


class TextConfig(_Section):
    """Text to draw tokens from."""

    source: str = Field(
        "pydoc-topics", description="pydoc-topics, a .txt/.jsonl/.parquet file, or dataset:NAME[/CONFIG][:SPLIT]"
    )
    column: str = Field("text", description="Field of jsonl, parquet and hub data sets")
    part: Literal["all", "first", "second"] = Field(
        "all", description="Which documents: a split by seed that never overlaps"
    )
    seed: int = Field(42, description="Seed of the split and the shuffle")


class CalibrationConfig(TextConfig):
    """Tokens that activations and gradients are measured on."""

    part: Literal["all", "first", "second"] = "first"
    sequences: int = Field(16, ge=1)
    sequence_length: int = Field(512, ge=8)
    validation_sequences: int = Field(
        6, ge=1, description="More sequences of the same text, on which `auto` compares plans and nothing is measured"
    )


class EvaluationConfig(TextConfig):
    """Held-out tokens that every variant is judged on."""

    part: Literal["all", "first", "second"] = "second"
    tokens: int = Field(8192, ge=16)
    window: int = Field(1024, ge=8, description="Tokens the model sees at once")
    stride: int = Field(512, ge=1, description="Tokens scored per window; the others are context")

    @model_validator(mode="after")
    def _windows_fit(self) -> EvaluationConfig:
        if self.stride > self.window:
            raise ValueError(f"stride = {self.stride} is larger than window = {self.window}; tokens would go unscored")
        if self.tokens < self.window:
            raise ValueError(f"tokens = {self.tokens} is less than one window of {self.window}; raise it or the other")
        return self


MEASUREMENTS = (
    "kurtosis",
    "sensitivity",
    "fisher",
    "sequence_fisher",
    "divergence",
    "super_weights",
    "module_errors",
    "layer_importance",
)
"""What can be measured beside what the strategies need."""


def _measurement_name(name: str) -> str:
    if name not in MEASUREMENTS:
        raise ValueError(str(unknown_name("measurement", name, MEASUREMENTS)))
    return name


class MeasureConfig(_Section):
    """What is measured of every module."""

    menu: Menu = Field(tuple(spec.name for spec in STOPS), description="Configurations")
    quantizer: Literal["hqq", "rtn", "hqq-package"] = "hqq"
    axis: Literal[0, 1] = Field(1, description="1: groups along in_features; 0: along out_features, as in the papers")
    label_draws: int = Field(
        default=4, ge=1, description="Draws of labels per calibration sequence, for the sequence-wise Fisher cost"
    )
    kl_specs: Menu | None = Field(
        None, description="Configurations whose divergence `kl` measures; default: one per bit width up to 4"
    )
    kl_sequences: int = Field(2, ge=1, description="Calibration sequences that `kl` measures on")
    also: tuple[Annotated[str, AfterValidator(_measurement_name)], ...] = Field(
        (), description=f"Measured beside what the strategies need: {', '.join(MEASUREMENTS)}"
    )
    sensitivity_spec: SpecName = Field("b4g64", description="Configuration that activation sensitivity is measured at")


class StrategyConfig(_Section):
    """How allocations are chosen."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_known(self) -> StrategyConfig:
        _checked(lambda: strategy(self.name, **self.options))
        return self

    @property
    def label(self) -> str:
        """Name with the options that were set: `sensi-boost top_m=1`."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in sorted(self.options.items()))])


class ConstraintsConfig(_Section):
    """What allocations keep beside the budget; strategies that solve a program keep them, uniform ignores them."""

    alike: tuple[str | tuple[str, ...], ...] = Field(
        (), description="Kinds with one configuration per layer: qkv, gate-up, or lists of kinds"
    )
    fixed: dict[str, SpecName] = Field({}, description='Pattern over LAYER.KIND → configuration: {"0.*": b8g64}')
    floor: dict[str, SpecName] = Field({}, description="Pattern → least configuration")
    most_configurations: int | None = Field(None, description="How many different configurations may be in use")
    device_limits: dict[str, str] = Field({}, description='Layers → bytes: {"0-15": 1.5 GB}')

    @model_validator(mode="after")
    def _is_readable(self) -> ConstraintsConfig:
        _checked(self.parsed)
        return self

    def parsed(self) -> Constraints:
        """The constraints as the library takes them."""
        return parse_constraints(self.model_dump())

    @property
    def plain(self) -> dict[str, Any]:
        """What was set, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)


class RunnerConfig(_Section):
    """How work is spread. Changes no result's key."""

    workers: int = Field(2, ge=1, description="Stages worked on at once")
    threads_per_worker: int = Field(1, ge=1, description="Threads of one stage's tensor work")
    device: str = Field("auto", description="auto (CUDA when there is one), cpu, or cuda[:n]")


class RunConfig(_Section):
    """One run: models × strategies × budgets."""

    name: str = Field(pattern=NAME_PATTERN, description="Results go to runs_dir/NAME")
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    strategies: tuple[StrategyConfig, ...] = Field(min_length=1)
    budgets: Annotated[tuple[BudgetText, ...], AfterValidator(_without_repeats)] = Field(
        min_length=1, description='"4.25" (bits per weight), "80 MB", "uniform b4g64 + 2%"'
    )
    constraints: ConstraintsConfig = ConstraintsConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    measure: MeasureConfig = MeasureConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runner: RunnerConfig = RunnerConfig()
    store: str = Field("store", min_length=1, description="Where artifacts are kept: a directory or any fsspec URL")
    runs_dir: str = Field("runs", min_length=1, description="Where results are written")

    @field_validator("budgets", mode="before")
    @classmethod
    def _budgets_are_text(cls, value: Any) -> Any:
        return tuple(str(item) for item in value) if isinstance(value, list | tuple) else value

    @field_validator("strategies", mode="before")
    @classmethod
    def _strategies_by_name(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        _without_repeats(tuple(model.name for model in models))
        return models

    @field_validator("strategies")
    @classmethod
    def _strategies_differ(cls, strategies: tuple[StrategyConfig, ...]) -> tuple[StrategyConfig, ...]:
        _without_repeats(tuple(item.label for item in strategies))
        return strategies

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
        if not self.constraints.plain:
            return self
        for item in self.strategies:
            if item.name != Uniform.name and not STRATEGIES[item.name].keeps_constraints:
                able = ", ".join(name for name, each in STRATEGIES.items() if each.keeps_constraints)
                raise ValueError(f"strategy {item.label!r} keeps no constraints; those that do: {able}")
        return self

    @model_validator(mode="after")
    def _kl_specs_are_on_the_menus(self) -> RunConfig:
        for menu in (model.menu or self.measure.menu for model in self.models):
            missing = [spec for spec in self.measure.kl_specs or () if spec not in menu]
            if missing:
                raise ValueError(f"measure.kl_specs has {missing[0]}, which is not on the menu {', '.join(menu)}")
        return self

    @property
    def run_dir(self) -> Path:
        """Where this run's results are written."""
        return Path(self.runs_dir) / self.name

    @property
    def needs(self) -> frozenset[str]:
        """Names of the measurements that the strategies use, and of those asked for beside."""
        used = (strategy(item.name, **item.options).needs for item in self.strategies)
        return frozenset(self.measure.also).union(*used)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration text; all but weights and their errors is."""
        return bool(self.needs - {"kurtosis", "frobenius"})

    @property
    def calibration_sequences(self) -> int:
        """Sequences taken from the calibration text: those measured on, and those that plans are tried on."""
        validation = self.calibration.validation_sequences if "trials" in self.needs else 0
        return self.calibration.sequences + validation


_SECTIONS: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "models": ModelConfig,
    "strategies": StrategyConfig,
    "constraints": ConstraintsConfig,
    "calibration": CalibrationConfig,
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
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError("; ".join(problem_texts(error, _SECTIONS))) from error


def preset_path(name: str) -> Path:
    """Path of a preset that comes with lmq (`demo`)."""
    return _presets_dir() / f"{name}.yaml"


def preset_names() -> list[str]:
    """Names of the presets that come with lmq."""
    return sorted(path.stem for path in _presets_dir().glob("*.yaml"))


def _presets_dir() -> Path:
    checkout = Path(__file__).parent.parent / "deployments" / "presets"
    return checkout if checkout.is_dir() else Path(__file__).parent / "presets"
