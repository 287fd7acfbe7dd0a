"""Everything a report shows, as plain values; None and empty mean "not measured"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lmq.allocation.error_table import ErrorTable
from lmq.model.structure import ModelStructure
from lmq.report.results import VariantResult

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StageTiming:
    """One stage of the run: what it was done for (`label`), whether it ran, how long it took, what it left.

    `peak_memory_bytes` is the most that the process held while the stage ran, None where other stages ran beside it.
    """

    stage: str
    label: str
    state: Literal["ran", "cached"]
    seconds: float | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference in mean log-perplexity of two variants scored on the same tokens: `variant` minus `baseline`.

    `variant` and `baseline` are `VariantResult.label`s; `stderr` is the standard error of the paired difference.
    """

    model: str
    variant: str
    baseline: str
    difference: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What was measured on one model.

    `profiles` are rows of tables by names of `lmq.measurement.registry.PROFILES`, `outliers`, `super_weights` and
    `layer_activity` rows of the tables of these names; `costs` holds what every module loses, by the names of the
    columns of `lmq.measurement.registry.COSTS`. Rows of
    `allocations` (by `VariantResult.label`) have layer, kind, bits, group_size, size_bytes and boosted (bool). A row's
    value may be None. `warnings` say what makes the measurements unfair.
    """

    name: str
    structure: ModelStructure
    profiles: Mapping[str, Rows] = field(default_factory=dict)
    outliers: Rows = ()
    super_weights: Rows = ()
    layer_activity: Rows = ()
    costs: Mapping[str, ErrorTable] = field(default_factory=dict)
    allocations: Mapping[str, Rows] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def statistics(self) -> Rows:
        """Statistics of the weights, whose table is that of their kurtosis."""
        return self.profiles.get("kurtosis", ())


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A whole run: its variants, the measurements of each model, and what it takes to do it again."""

    run: str
    results: Sequence[VariantResult]
    models: Sequence[ModelReport] = ()
    paired: Sequence[PairedDifference] = ()
    stages: Sequence[StageTiming] = ()
    config: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
