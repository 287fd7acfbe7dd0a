"""The sections of a run's configuration, each checked by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lmq.allocation.budget import Budget
from lmq.allocation.constraints import Constraints, parse_constraints
from lmq.allocation.strategies import strategy
from lmq.allocation.targets import target_named
from lmq.errors import InputError, unknown_name
from lmq.evaluation.baselines import RoundedBaseline
from lmq.evaluation.options import EvaluationOptions
from lmq.evaluation.zero_shot import STANDARD_TASKS
from lmq.formats.spec import STOPS, QuantSpec
from lmq.images.prompts import TEMPLATE, check_template
from lmq.measurement.registry import MEASUREMENTS
from lmq.quantizers import QUANTIZERS, quantizer
from lmq_flows.config.names import slug

T = TypeVar("T")


class Section(BaseModel):
    """A part of a configuration: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def checked(check: Callable[[], T]) -> T:
    """Result of a check, its InputError as the ValueError that pydantic collects together with the key."""
    try:
        return check()
    except InputError as error:
        raise ValueError(str(error)) from error


def _spec_name(text: str) -> str:
    return checked(lambda: QuantSpec.parse(text)).name


def _budget_text(text: str) -> str:
    checked(lambda: Budget.parse(text))
    return text


def without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, of which no two may give the same file name. Raises ValueError."""
    slugs = [slug(name) for name in names]
    for index, name in enumerate(names):
        if slugs[index] in slugs[:index]:
            raise ValueError(f"{name!r} is listed twice (letters count the same in upper and lower case)")
    return names


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SpecName = Annotated[str, AfterValidator(_spec_name)]
Menu = Annotated[tuple[SpecName, ...], Field(min_length=1), AfterValidator(without_repeats)]
BudgetText = Annotated[str, AfterValidator(_budget_text)]


class ModelConfig(Section):
    """A model to quantize."""

    name: str = Field(pattern=NAME_PATTERN, description="Short name used in tables and paths")
    source: str = Field(min_length=1, description="Hub id, directory, .gguf file, or package:NAME/FILE")
    sha256: str | None = Field(None, description="Expected sha256 of a single-file source")
    dtype: Literal["exact", "float16", "bfloat16"] = Field(
        default="exact", description="What a GGUF file is converted to; exact: the smallest type that holds every value"
    )
    equalize: bool = Field(
        default=False, description="Rescale channels between matrices first: the same function, easier to quantize"
    )
    menu: Menu | None = Field(None, description="Menu of this model; default: measure.menu")


class TextConfig(Section):
    """Text to draw tokens from."""

    source: str = Field(
        "pydoc-topics",
        description="pydoc-topics, wikitext2, c4, ptb, a text, jsonl or parquet file, or dataset:NAME[/CONFIG][:SPLIT]",
    )
    column: str = Field("text", description="Field of jsonl, parquet and hub data sets")
    part: Literal["all", "first", "second"] = Field(
        "all", description="Which documents: a split by seed that never overlaps"
    )
    seed: int = Field(42, description="Seed of the split and the shuffle")


class CalibrationConfig(TextConfig):
    """Tokens that activations and gradients are measured on."""

    part: Literal["all", "first", "second"] = "first"
    sequences: int = Field(32, ge=1)
    sequence_length: int = Field(512, ge=8)
    validation_sequences: int = Field(
        6, ge=1, description="More sequences of the same text, on which `auto` compares plans and nothing is measured"
    )


class EvaluationConfig(TextConfig):
    """Held-out tokens that every variant is judged on."""

    part: Literal["all", "first", "second"] = "second"
    tokens: int = Field(EvaluationOptions.tokens, ge=16)
    window: int = Field(EvaluationOptions.window, ge=8, description="Tokens the model sees at once")
    stride: int = Field(EvaluationOptions.stride, ge=1, description="Tokens scored per window; the others are context")
    performance: bool = Field(False, description="Measure memory and speed of every variant, on this machine")
    tasks: tuple[str, ...] = Field(
        (), description=f"Zero-shot tasks of lm-eval ({', '.join(STANDARD_TASKS)}, ...) or local task files (.yaml)"
    )
    task_limit: int | None = Field(None, ge=1, description="Questions per task; default: all")

    @model_validator(mode="after")
    def _windows_fit(self) -> EvaluationConfig:
        if self.stride > self.window:
            raise ValueError(f"stride = {self.stride} is larger than window = {self.window}; tokens would go unscored")
        without_repeats(self.tasks)
        if self.tokens < self.window:
            raise ValueError(f"tokens = {self.tokens} is less than one window of {self.window}; raise it or the other")
        return self


def _template(text: str) -> str:
    checked(lambda: check_template(text))
    return text


class ImagesConfig(Section):
    """Images that encoders are measured and judged on in the place of texts, or vision-language models on with them."""

    source: str = Field(
        "digits",
        description="digits (of scikit-learn), a folder with a folder for each class, Parquet files, or dataset:NAME",
    )
    evaluation_source: str | None = Field(
        None, description="What is judged on, such as dataset:NAME:test; default: one half of source, by seed"
    )
    column: str = Field("image", description="Field of Parquet files and data sets that holds images")
    label_column: str = Field("label", description="Field that holds labels: numbers or names of classes")
    text_column: str | None = Field(
        None, description="Field that holds a text about the image: vision-language models are measured on such pairs"
    )
    calibration: int = Field(128, ge=1, description="Images that activations and gradients are measured on")
    evaluation: int | None = Field(None, ge=1, description="Images that variants are judged on; default: all there are")
    probe: int | None = Field(
        None, ge=2, description="Fit a linear classifier to embeddings of so many images of source; for encoders"
    )
    templates: tuple[Annotated[str, AfterValidator(_template)], ...] = Field(
        (TEMPLATE,), min_length=1, description="Texts for a class of a model that compares images with texts"
    )
    unreadable: float = Field(0.01, ge=0, lt=1, description="Share of images that may be damaged, and is left out")
    seed: int = Field(42, description="Seed of the halves and of the order")

    @property
    def sources(self) -> tuple[str, str]:
        """What is measured on, and what is judged on."""
        return self.source, self.evaluation_source or self.source

    @property
    def parts(self) -> tuple[str, str]:
        """Which part of these: the halves of one source never overlap."""
        return ("all", "all") if self.evaluation_source is not None else ("first", "second")

    @model_validator(mode="after")
    def _judges_on_other_images(self) -> ImagesConfig:
        if self.source == self.evaluation_source:
            raise ValueError(
                f"source and evaluation_source are both {self.source!r}; leave evaluation_source out to "
                "take a half each"
            )
        return self


def _measurement_name(name: str) -> str:
    if name not in MEASUREMENTS:
        raise ValueError(str(unknown_name("measurement", name, MEASUREMENTS)))
    return name


def _quantizer_name(name: str) -> str:
    if name not in QUANTIZERS:
        raise ValueError(str(unknown_name("quantizer", name, QUANTIZERS)))
    return name


QuantizerName = Annotated[str, AfterValidator(_quantizer_name)]


class MeasureConfig(Section):
    """What is measured of every module."""

    menu: Menu = Field(tuple(spec.name for spec in STOPS), description="Configurations")
    quantizer: QuantizerName = Field(
        "fisher-gptq",
        description="How codes are found, unless a strategy says otherwise; hqq and rtn need no calibration text",
        json_schema_extra={"enum": [*QUANTIZERS]},
    )
    quantizer_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the quantizer: {damping: 0.01, order: descending} of gptq"
    )
    axis: Literal[0, 1] = Field(1, description="1: groups along in_features; 0: along out_features, as in the papers")
    expert_tokens: Literal["routed", "all"] = Field(
        default="routed",
        description="Tokens that the codes of an expert are chosen on: those routed to it, or all, which takes longer",
    )
    label_draws: int = Field(
        default=2, ge=1, description="Draws of labels per calibration sequence, for fisher-gptq and loss-aware"
    )
    kl_specs: Menu | None = Field(
        None, description="Configurations whose divergence `kl` measures; default: one per bit width up to 4"
    )
    kl_sequences: int = Field(2, ge=1, description="Calibration sequences that `kl` measures on")
    also: tuple[Annotated[str, AfterValidator(_measurement_name)], ...] = Field(
        (), description=f"Measured beside what the strategies need: {', '.join(MEASUREMENTS)}"
    )
    sensitivity_spec: SpecName = Field("b4g64", description="Configuration that activation sensitivity is measured at")

    @model_validator(mode="after")
    def _quantizer_takes_its_options(self) -> MeasureConfig:
        if "axis" in self.quantizer_options:
            raise ValueError("quantizer_options has axis, which is a key of its own: set measure.axis")
        checked(lambda: quantizer(self.quantizer, axis=self.axis, **self.quantizer_options))
        return self


class LearnedRoundingConfig(Section):
    """Codes, scales and zeros of every layer moved for what leaves its block, after bits were given out."""

    steps: int = Field(60, ge=1, description="Steps for every layer; about half a second each for 3.5 million weights")
    sequences_per_step: int = Field(2, ge=1, description="Of those that are measured on, in turn")


class PolishConfig(Section):
    """Scales and zeros tuned together for the divergence of the whole model, after bits were given out."""

    steps: int = Field(60, ge=1, description="Steps of the tuning; a few seconds each for 100 million weights")
    sequences_per_step: int = Field(2, ge=1)
    sequences: int = Field(64, ge=1, description="More sequences of the calibration text that are tuned on, in turn")
    rate: float = Field(0.001, gt=0, lt=1, description="Largest step of a scale, as a share of the median scale")


class StrategyConfig(Section):
    """How allocations are chosen."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    quantizer: QuantizerName | None = Field(
        None, description="How its codes are found; default: hqq for the papers' strategies, else measure.quantizer"
    )
    tuned: bool = Field(True, description="Whether learned_rounding and polish of the run go on from its plans")

    @model_validator(mode="after")
    def _is_known(self) -> StrategyConfig:
        checked(lambda: strategy(self.name, **self.options))
        return self

    @property
    def label(self) -> str:
        """Name with what was set: `sensi-boost top_m=1`, `uniform quantizer=hqq`."""
        options = self.options if self.quantizer is None else {**self.options, "quantizer": self.quantizer}
        return " ".join([self.name, *(f"{key}={value}" for key, value in sorted(options.items()))])


class BaselineConfig(Section):
    """What variants are compared with: a rounding of every matrix, or a checkpoint that another program made."""

    name: str = Field(min_length=1, description="rtn b4g64, nf4, nf4 g128; with path, any name for the tables")
    path: str | None = Field(None, description="Directory of a checkpoint of the model (GPTQ, AWQ, any other)")
    model: str | None = Field(None, description="Which model of the run path is a checkpoint of, with several")

    @model_validator(mode="after")
    def _is_known(self) -> BaselineConfig:
        if self.path is None:
            checked(lambda: RoundedBaseline.parse(self.name))
            if self.model is not None:
                raise ValueError(f"baseline {self.name!r} is for every model; take out its key model")
        return self

    @property
    def label(self) -> str:
        """Name in tables, as a strategy's."""
        return RoundedBaseline.parse(self.name).label if self.path is None else self.name


def _target_name(name: str) -> str:
    return checked(lambda: target_named(name)).name


TargetName = Annotated[str, AfterValidator(_target_name)]


class ConstraintsConfig(Section):
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
        checked(self.parsed)
        return self

    def parsed(self) -> Constraints:
        """The constraints as the library takes them."""
        return parse_constraints(self.model_dump())

    @property
    def plain(self) -> dict[str, Any]:
        """What was set, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)


class RunnerConfig(Section):
    """How work is spread. Changes no result's key."""

    kind: Literal["threads", "dask", "ray"] = Field(
        default="threads", description="threads of one process, or worker processes of Dask or Ray, here or elsewhere"
    )
    address: str | None = Field(
        None, description="An existing cluster, as in tcp://host:8786 or ray://host:10001; none: one on this machine"
    )
    workers: int = Field(2, ge=1, description="Stages (with Dask and Ray: tasks) worked on at once")
    threads_per_worker: int = Field(1, ge=1, description="Threads of one stage's tensor work")
    chunk_seconds: float | None = Field(
        None,
        gt=0,
        description="Seconds of work per task, which carries several layers of a stage; none: 60 with threads, "
        "20 with Dask and Ray, which may lose a worker",
    )
    device: str = Field("auto", description="auto (CUDA when there is one), cpu, or cuda[:n]")

    @model_validator(mode="after")
    def _threads_have_no_address(self) -> RunnerConfig:
        if self.kind == "threads" and self.address is not None:
            raise ValueError(f"address = {self.address!r} is for kind dask or ray; threads run in this process")
        return self

    @property
    def seconds_per_task(self) -> float:
        """`chunk_seconds`, or what it is for this kind of runner."""
        return self.chunk_seconds or (60.0 if self.kind == "threads" else 20.0)
