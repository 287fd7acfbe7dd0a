"""The budget program: the configuration of every module that costs least within a budget of bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from lmq.allocation.knapsack import total
from lmq.allocation.milp import solve_milp
from lmq.allocation.program import Program, ProgramConstraints, smallest_choice, solve_column_sets
from lmq.errors import InfeasibleBudget, InputError, unknown_name
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

logger = logging.getLogger(__name__)

METHODS = ("knapsack", "highs")
PROVEN_GAP = 1e-9
"""A relative gap up to this counts as proven optimal."""
TIME_LIMIT_S = 120.0
"""What HiGHS gets for limits, and for the rare table on which the knapsack search needs too much memory."""

ALLOCATION_SCHEMA = TableSchema(
    "allocation",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("cost", pa.float64()),
            pa.field("boosted", pa.bool_(), nullable=False),
        ]
    ),
)


@dataclass(frozen=True, eq=False)
class Solution:
    """An allocation as columns: `choice` [modules] int64, its cost, a proven lower bound of any, and its size."""

    choice: np.ndarray
    objective: float
    lower_bound: float
    size_bytes: int

    @property
    def gap(self) -> float:
        """How far the objective may be above the optimum, relative to the objective."""
        return relative_gap(self.objective, self.lower_bound)


@dataclass(frozen=True)
class Assignment:
    """The configuration given to one module; `cost` is None where the strategy solves no program."""

    module: ModuleId
    spec: QuantSpec
    parameters: int
    size_bytes: int
    cost: float | None = None
    boosted: bool = False


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A configuration for every module, in model order.

    `objective` and `lower_bound` are None where the strategy solves no program.
    """

    assignments: tuple[Assignment, ...]
    objective: float | None = None
    lower_bound: float | None = None

    @property
    def specs(self) -> dict[ModuleId, QuantSpec]:
        """Configuration of each module, in model order."""
        return {assignment.module: assignment.spec for assignment in self.assignments}

    @property
    def size_bytes(self) -> int:
        """Bytes of all quantized modules."""
        return sum(assignment.size_bytes for assignment in self.assignments)

    @property
    def parameters(self) -> int:
        """Weights in all quantized modules."""
        return sum(assignment.parameters for assignment in self.assignments)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the quantized modules."""
        return 8 * self.size_bytes / self.parameters

    @property
    def gap(self) -> float | None:
        """How far the objective may be above the optimum, relative; None where no program was solved."""
        if self.objective is None or self.lower_bound is None:
            return None
        return relative_gap(self.objective, self.lower_bound)

    def to_rows(self) -> list[dict[str, Any]]:
        """Rows of `ALLOCATION_SCHEMA`."""
        return [
            {
                "layer": item.module.layer,
                "kind": item.module.kind,
                "bits": item.spec.bits,
                "group_size": item.spec.group_size,
                "meta_bits": item.spec.meta_bits,
                "meta_group_size": item.spec.meta_group_size,
                "parameters": item.parameters,
                "size_bytes": item.size_bytes,
                "cost": item.cost,
                "boosted": item.boosted,
            }
            for item in self.assignments
        ]

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        objective: float | None = None,
        lower_bound: float | None = None,
    ) -> Allocation:
        """Inverse of `to_rows`; what the rows do not hold is given beside them."""
        assignments = tuple(
            Assignment(
                ModuleId(row["layer"], row["kind"]),
                QuantSpec.from_row(row),
                row["parameters"],
                row["size_bytes"],
                row["cost"],
                row["boosted"],
            )
            for row in rows
        )
        return cls(assignments=assignments, objective=objective, lower_bound=lower_bound)


def solve(
    costs: ArrayLike,
    sizes_bytes: ArrayLike,
    budget_bytes: int,
    *,
    method: str = "knapsack",
    constraints: ProgramConstraints | None = None,
) -> Solution:
    """Choose one configuration per module with the least total cost and a total size within the budget.

    `costs` float and `sizes_bytes` int, both [modules, configurations]. Both methods prove the optimum to a relative
    gap of 1e-9: `knapsack` in milliseconds (`lmq.allocation.knapsack`), `highs` through PuLP in seconds to minutes
    (`lmq.allocation.milp`). Where the knapsack search would need too much memory, and for constraints with limits,
    HiGHS takes over for at most two minutes; `gap` says what is proven. Source: MXQ equations 1 to 3.
    Raises InfeasibleBudget if even the smallest allocation is over the budget or a limit, InputError for costs that are
    not finite, sizes that are not positive whole numbers, shapes that differ, or constraints that contradict.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    cost_table, size_table = _checked_costs(costs), _checked_sizes(sizes_bytes)
    if cost_table.shape != size_table.shape:
        raise InputError(
            f"costs have shape {cost_table.shape} and sizes {size_table.shape}; both must be [modules, configurations]"
        )
    program = Program.of(cost_table, size_table, constraints)
    smallest = _smallest_within(program, budget_bytes)
    capacity = min(math.floor(budget_bytes), program.size_bytes(program.largest))
    if method == "highs":
        return _solution(cost_table, size_table, program, *solve_milp(program, capacity, smallest))
    if program.limits:
        milp = solve_milp(program, capacity, smallest, time_limit_s=TIME_LIMIT_S)
        return _solution(cost_table, size_table, program, *milp)
    columns, lower_bound = solve_column_sets(program, capacity)
    solution = _solution(cost_table, size_table, program, columns, lower_bound)
    unproven = solution.objective - solution.lower_bound
    if unproven <= PROVEN_GAP * max(abs(solution.objective), float(np.abs(cost_table).max())):
        return solution  # relative to the costs where they cancel to an objective near 0
    logger.warning("knapsack search needs too much memory at a gap of %.1e; continuing with HiGHS", solution.gap)
    solved, bound = solve_milp(program, capacity, columns, time_limit_s=TIME_LIMIT_S)
    better = min(solved, columns, key=lambda candidate: total(program.costs, candidate))
    return _solution(cost_table, size_table, program, better, max(bound, lower_bound))


def check_feasible_program(sizes_bytes: ArrayLike, budget_bytes: int, constraints: ProgramConstraints) -> None:
    """Raise what `solve` would for this budget and these constraints, before anything has a cost."""
    sizes = _checked_sizes(sizes_bytes)
    _smallest_within(Program.of(np.zeros(sizes.shape), sizes, constraints), budget_bytes)


def check_budget(budget_bytes: int, sizes_bytes: np.ndarray, *, what: str = "the budget") -> None:
    """Raise InfeasibleBudget if no allocation fits, InputError for a budget that is not a number.

    `sizes_bytes` are [modules, configurations].
    """
    if not math.isfinite(budget_bytes):
        raise InputError(f"a budget of {budget_bytes} bytes is not a number of bytes; give a positive whole number")
    smallest, largest = int(sizes_bytes.min(axis=1).sum()), int(sizes_bytes.max(axis=1).sum())
    if budget_bytes < smallest:
        raise InfeasibleBudget(math.floor(budget_bytes), smallest, largest, what)


def relative_gap(objective: float, lower_bound: float) -> float:
    """(objective − lower bound) / |objective|, 0 where they are equal."""
    if objective <= lower_bound:
        return 0.0
    return (objective - lower_bound) / abs(objective) if objective else math.inf


def _smallest_within(program: Program, budget_bytes: int) -> np.ndarray:
    """The smallest allocation [rows] that keeps the constraints, checked to be within the budget and every limit."""
    if not math.isfinite(budget_bytes):
        raise InputError(f"a budget of {budget_bytes} bytes is not a number of bytes; give a positive whole number")
    for limit in program.limits:
        least, most = (program.size_bytes(columns, limit.rows) for columns in (program.smallest, program.largest))
        if limit.size_bytes < least:
            raise InfeasibleBudget(limit.size_bytes, least, most, limit.name)
    smallest = smallest_choice(program)
    if smallest is None:
        limits = " and ".join(["", *(limit.name for limit in program.limits)])
        raise InputError(
            f"no allocation keeps at most {program.most_configurations} different configurations{limits} together; "
            "allow more of them, or relax what is fixed, floored or limited"
        )
    if budget_bytes < program.size_bytes(smallest):
        what = "under the constraints the budget" if program.is_constrained else "the budget"
        largest_bytes = _largest_bytes(program, smallest)
        raise InfeasibleBudget(math.floor(budget_bytes), program.size_bytes(smallest), largest_bytes, what)
    return smallest


def _largest_bytes(program: Program, smallest: np.ndarray) -> int:
    """The largest size of any allocation that keeps the constraints."""
    by_size = replace(program, costs=-program.sizes.astype(np.float64))
    capacity = program.size_bytes(program.largest)
    if program.limits:
        return program.size_bytes(solve_milp(by_size, capacity, smallest, time_limit_s=TIME_LIMIT_S)[0])
    return program.size_bytes(solve_column_sets(by_size, capacity)[0])


def _solution(
    costs: np.ndarray, sizes: np.ndarray, program: Program, choice_of_rows: np.ndarray, lower_bound: float
) -> Solution:
    columns = choice_of_rows[program.row_of]
    objective = float(total(costs, columns))
    return Solution(columns, objective, min(lower_bound, objective), int(total(sizes, columns)))


def _checked_costs(costs: ArrayLike) -> np.ndarray:
    table = np.asarray(costs, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise InputError(
            f"costs have shape {table.shape}; they must be [modules, configurations], at least one of each"
        )
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0].tolist()
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(table))} of {table.size} costs are not finite, the first "
            f"{table[row, column]} at module {row}, configuration {column}; measure them again or drop them"
        )
    return table


def _checked_sizes(sizes_bytes: ArrayLike) -> np.ndarray:
    given = np.asarray(sizes_bytes)
    whole = given.dtype.kind in "iu" or (given.dtype.kind == "f" and bool((given == np.rint(given)).all()))
    if not whole:
        raise InputError("sizes are not whole numbers of bytes; give integers, as QuantSpec.size_bytes does")
    table = given.astype(np.int64)
    if table.size and table.min() <= 0:
        row, column = np.argwhere(table <= 0)[0].tolist()
        raise InputError(
            f"size {table[row, column]} at module {row}, configuration {column} is not positive; give sizes in bytes"
        )
    return table
