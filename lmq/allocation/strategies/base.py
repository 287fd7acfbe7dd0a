"""What every strategy works with: the measurements it may use, the protocol it follows, and shared steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from lmq.allocation.budget import module_sizes
from lmq.allocation.constraints import Constraints, violations
from lmq.allocation.error_table import ErrorTable
from lmq.allocation.refine import Trials
from lmq.allocation.solver import Allocation, Assignment, check_budget, check_feasible_program, solve
from lmq.allocation.targets import Target
from lmq.errors import InputError, LmqError
from lmq.formats.spec import QuantSpec
from lmq.measurement.registry import PROFILES
from lmq.model.structure import ModuleId, ModuleInfo
from lmq.outliers import outlier_modules, profiles_by_kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """The modules to allocate, the configurations to choose from, and what was measured; None is not measured.

    `profiles` hold one number per module, None where it has none (a constant matrix has no kurtosis), and `costs` an
    error table, by names of `lmq.measurement.registry`; the table of `divergence` may hold fewer configurations.
    `layer_scores` hold one number per layer for each metric of `lmq.layers.importance.layers.layer_scores`. `trials`
    tries allocations on the model. `constraints` are kept by strategies that solve a program; the others refuse them,
    but for uniform. `towers` are the layers of each of several, so that the last of one is no neighbour of the first of
    the next; empty for one. Bytes are those of the file of `target`, or of our checkpoint.
    """

    modules: tuple[ModuleInfo, ...]
    menu: tuple[QuantSpec, ...]
    profiles: Mapping[str, Mapping[ModuleId, float | None]] = field(default_factory=dict)
    costs: Mapping[str, ErrorTable] = field(default_factory=dict)
    layer_scores: Mapping[str, Sequence[float]] | None = None
    trials: Trials | None = None
    constraints: Constraints = field(default_factory=Constraints)
    towers: tuple[range, ...] = ()
    target: Target | None = None

    def by_tower(self, profile: Mapping[ModuleId, float | None]) -> Iterator[dict[str, dict[int, float | None]]]:
        """One number per module as kind → layer → number, for every tower."""
        for layers in self.towers or (None,):
            within = {module: each for module, each in profile.items() if layers is None or module.layer in layers}
            yield profiles_by_kind(within)


TRIALS = "trials"
"""What a strategy needs that tries allocations on the model, beside the names of measurements."""


class Strategy(Protocol):
    """How an allocation is chosen. A strategy is a frozen keyword-only dataclass; its fields are its options.

    `needs` names the measurements that must be there, and `TRIALS`. `keeps_constraints` says whether its allocations
    keep the constraints of the measurements. `quantizer` is the one that it was published with; None: that of the run.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    keeps_constraints: ClassVar[bool]
    quantizer: ClassVar[str | None]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the measurements this strategy uses."""
        ...

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Choose a configuration for every module. Raises InfeasibleBudget, InputError."""
        ...


@dataclass(frozen=True, eq=False)
class Choices:
    """The menu by size, smallest first, and the bytes of every module under it: int64 [modules, configurations]."""

    modules: tuple[ModuleInfo, ...]
    specs: tuple[QuantSpec, ...]
    sizes_bytes: np.ndarray

    @classmethod
    def of(cls, measurements: Measurements, budget_bytes: int) -> Choices:
        """The choices of a strategy that keeps no constraints, checked to hold an allocation within the budget.

        Raises InfeasibleBudget, and InputError for measurements with constraints.
        """
        if not measurements.constraints.is_empty:
            raise InputError(
                "this strategy keeps no constraints; leave them out, or use a strategy that solves the budget program, "
                "such as loss-aware or mxq"
            )
        choices = cls.by_size(measurements)
        check_budget(budget_bytes, choices.sizes_bytes)
        return choices

    @classmethod
    def by_size(cls, measurements: Measurements) -> Choices:
        """The menu sorted, smallest first. Raises InputError for a menu that does not fit the modules."""
        specs = tuple(sorted(measurements.menu, key=lambda spec: spec.bits_per_weight))
        return cls(measurements.modules, specs, module_sizes(measurements.modules, specs, measurements.target))

    def size_bytes(self, columns: np.ndarray) -> int:
        """Total bytes of an allocation, its columns [modules]."""
        return int(self.sizes_bytes[np.arange(len(columns)), columns].sum())

    def largest_uniform(self, budget_bytes: int) -> int:
        """Column of the largest configuration that fits the budget when every module has it."""
        return int(np.flatnonzero(self.sizes_bytes.sum(axis=0) <= budget_bytes).max())

    def allocation(self, columns: np.ndarray, *, boosted: np.ndarray | None = None) -> Allocation:
        """Allocation of columns [modules] that no program was solved for; `boosted` [modules] bool."""
        is_boosted = np.zeros(len(columns), bool) if boosted is None else boosted
        return Allocation(
            assignments=tuple(
                Assignment(
                    module.id,
                    self.specs[column],
                    module.parameters,
                    int(self.sizes_bytes[row, column]),
                    boosted=bool(is_boosted[row]),
                )
                for row, (module, column) in enumerate(zip(self.modules, columns.tolist(), strict=True))
            )
        )


def reduce_to_fit(
    choices: Choices, columns: np.ndarray, turns: Sequence[Sequence[int]], budget_bytes: int
) -> np.ndarray:
    """Move modules down the menu, one configuration at a time, until the allocation fits the budget.

    Each group of `turns` gives way in its order, one step each and round again, until it is at the smallest
    configuration; then the next group does. Together the groups hold every module, so a feasible budget is reached.
    """
    reduced = columns.copy()
    over_bytes = choices.size_bytes(reduced) - budget_bytes
    for turn in turns:
        for _ in range(len(choices.specs)):
            for row in turn:
                if over_bytes <= 0:
                    return reduced
                column = reduced[row]
                if column > 0:
                    over_bytes -= int(choices.sizes_bytes[row, column] - choices.sizes_bytes[row, column - 1])
                    reduced[row] = column - 1
    return reduced


def solve_program(
    measurements: Measurements,
    budget_bytes: int,
    costs_of: Callable[[Choices], np.ndarray],
) -> Allocation:
    """Solve the budget program for the costs [modules, configurations] that `costs_of` gives for the sorted menu.

    The constraints of the measurements are kept. Raises InfeasibleBudget, InputError.
    """
    choices = Choices.by_size(measurements)
    constraints = measurements.constraints.compile(choices.modules, choices.specs)
    check_feasible_program(choices.sizes_bytes, budget_bytes, constraints)
    costs = costs_of(choices)
    solution = solve(costs, choices.sizes_bytes, budget_bytes, constraints=constraints)
    assignments = tuple(
        Assignment(
            module.id,
            choices.specs[column],
            module.parameters,
            int(choices.sizes_bytes[row, column]),
            cost=float(costs[row, column]),
        )
        for row, (module, column) in enumerate(zip(choices.modules, solution.choice.tolist(), strict=True))
    )
    allocation = Allocation(assignments=assignments, objective=solution.objective, lower_bound=solution.lower_bound)
    if broken := violations(allocation, measurements.constraints):
        raise LmqError(f"the solution breaks the constraints it was given: {_some(broken)}")
    return allocation


def table_costs(measurements: Measurements, name: str, choices: Choices) -> np.ndarray:
    """Costs [modules, configurations] in the order of the choices; the table's own order and extras do not matter.

    Raises InputError naming the modules and configurations that the table lacks, or the cost that is not finite.
    """
    table = measurements.costs.get(name)
    if table is None:
        raise not_measured(name)
    row_of = {module: row for row, module in enumerate(table.modules)}
    column_of = {spec: column for column, spec in enumerate(table.specs)}
    missing = [str(module.id) for module in choices.modules if module.id not in row_of]
    missing += [spec.name for spec in choices.specs if spec not in column_of]
    if missing:
        raise InputError(f"the {name} table lacks {_some(missing)}; measure them or take them out of the menu")
    rows = [row_of[module.id] for module in choices.modules]
    costs = table.cost[np.ix_(rows, [column_of[spec] for spec in choices.specs])]
    unusable = [
        f"{choices.modules[row].id} at {choices.specs[column].name}" for row, column in np.argwhere(~np.isfinite(costs))
    ]
    if unusable:
        raise InputError(f"the {name} table has no finite cost for {_some(unusable)}; measure them again")
    return costs


def module_profile(
    measurements: Measurements, name: str, modules: Sequence[ModuleInfo]
) -> dict[ModuleId, float | None]:
    """One number for every module to allocate, None where it has none. Raises InputError naming those not measured."""
    profile = measurements.profiles.get(name)
    if profile is None:
        raise not_measured(name)
    missing = [str(module.id) for module in modules if module.id not in profile]
    if missing:
        raise InputError(f"no {name} for {_some(missing)}; measure them and try again")
    return {module.id: profile[module.id] for module in modules}


def profile_outliers(
    measurements: Measurements, name: str, profile: Mapping[ModuleId, float | None], top_m: int
) -> dict[str, list[int]]:
    """Kind → layers at which the profile of this name jumps; `top_m` of them at most in every tower, 0 is all."""
    found: dict[str, list[int]] = {}
    for profiles in measurements.by_tower(profile):
        outliers = outlier_modules(profiles, difference=PROFILES[name].difference, top_m=top_m)
        for kind, layers in outliers.items():
            found.setdefault(kind, []).extend(layers)
    return found


def not_measured(name: str) -> InputError:
    """The error of a strategy that lacks a measurement."""
    return InputError(f"the strategy needs {name}, which was not measured; measure it first")


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
