"""What a person fills in, in the Prefect UI, to have one model quantized; the server checks it before anything runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmq.allocation.strategies import STRATEGIES
from lmq.allocation.targets import TARGETS
from lmq.formats.spec import STOPS
from lmq_flows.config.names import slug
from lmq_flows.config.run import RunConfig
from lmq_flows.config.sections import (
    NAME_PATTERN,
    CalibrationConfig,
    EvaluationConfig,
    ModelConfig,
    RunnerConfig,
    Section,
    StrategyConfig,
)

_NUMBER = r"(\d+(\.\d+)?|\.\d+)"
BUDGET_PATTERN = (
    rf"^({_NUMBER} *(bpw)?|{_NUMBER} *[KMGTkmgt]?i?B|uniform +(b\d+g\d+|i?q\d_\w+|(mx|nv)fp4)( *\+ *{_NUMBER} *%)?)$"
)
"""Budgets as `lmq.allocation.budget` reads them, in the form a JSON schema takes."""

StopName = Annotated[str, Field(json_schema_extra={"enum": [spec.name for spec in STOPS]})]


class QuantizeRequest(Section):
    """One model, one strategy, one budget."""

    model: str = Field(pattern=NAME_PATTERN, description="Short name used in tables and paths")
    source: str = Field(min_length=1, description="Hub id, directory, .gguf file, or package:NAME/FILE")
    dtype: Literal["exact", "float16", "bfloat16"] = Field(
        default="float16", description="What a GGUF file is converted to; exact: the type that holds every value"
    )
    strategy: str = Field(
        "loss-aware", description="How bits are given out", json_schema_extra={"enum": list(STRATEGIES)}
    )
    budget: str = Field(
        "4.25", pattern=BUDGET_PATTERN, description='"4.25" (bits per weight), "80 MB", "uniform b3g64 + 2%"'
    )
    menu: tuple[StopName, ...] = Field(
        tuple(spec.name for spec in STOPS), min_length=1, description="Configurations to choose from"
    )
    target: str | None = Field(
        None, description="What will serve the checkpoint", json_schema_extra={"enum": [None, *TARGETS]}
    )
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def run_config(self, store: str, runs_dir: str, runner: RunnerConfig | None = None) -> RunConfig:
        """The run that was asked for. Raises pydantic's ValidationError for what only a run can tell is wrong."""
        data: dict[str, Any] = {
            "name": slug(f"{self.model}-{self.strategy}-{self.budget}"),
            "models": [ModelConfig(name=self.model, source=self.source, dtype=self.dtype)],
            "strategies": [StrategyConfig(name=self.strategy)],
            "budgets": [self.budget],
            "target": self.target,
            "measure": {"menu": list(self.menu)},
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            "runner": runner or RunnerConfig(),
            "store": store,
            "runs_dir": runs_dir,
        }
        return RunConfig.model_validate(data)
