"""The budget program as numbers: what every allocation costs and takes, and the constraints it must keep.

Rows that must be alike are fused into one whose costs and sizes are their sums, so that every solver keeps them
alike by construction.

At most k different configurations: the program is solved for every set of k, the most promising first
(`solve_column_sets`). A menu of 12 has at most 924 sets of one size. The Lagrangian bound of a set
(`lmq.allocation.knapsack`) is found in a fraction of a millisecond and rules out nearly all; what it leaves is solved
exactly, so the best one found is the optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Self

import numpy as np

from lmq.allocation.knapsack import lagrangian_bound, solve_knapsack, total
from lmq.errors import InputError

MAX_COLUMN_SETS = 20_000
"""Sets of configurations to look through for one program: about ten seconds. A menu of 12 has at most 924."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Bytes that the modules at `rows` may take together; `name` is what an error calls it."""

    name: str
    rows: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgramConstraints:
    """What an allocation must keep beside the budget. `lmq.allocation.constraints` makes it from names and patterns.

    allowed: bool [modules, configurations]. groups: rows that share one configuration; groups may overlap.
    most_configurations: how many different configurations may be in use, None for any number.
    limits: bytes of some rows together; a limit holds all rows of a group or none.
    """

    allowed: np.ndarray
    groups: tuple[tuple[int, ...], ...] = ()
    most_configurations: int | None = None
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """Costs float64, sizes int64 and allowed bool, all [rows, configurations]; a row is a group of alike modules.

    `row_of` [modules] is the row of every module. Rows of limits count in these rows.
    """

    costs: np.ndarray
    sizes: np.ndarray
    allowed: np.ndarray
    row_of: np.ndarray
    most_configurations: int | None = None
    limits: tuple[Limit, ...] = ()

    @classmethod
    def of(cls, costs: np.ndarray, sizes: np.ndarray, constraints: ProgramConstraints | None = None) -> Self:
        """Fuse the alike rows of [modules, configurations]. Raises InputError for constraints that do not fit."""
        if constraints is None:
            return cls(costs=costs, sizes=sizes, allowed=np.ones(costs.shape, bool), row_of=np.arange(len(costs)))
        _check(constraints, costs.shape)
        row_of = row_of_modules(len(costs), constraints.groups)
        fused = cls(
            costs=_fused(costs, row_of),
            sizes=_fused(sizes, row_of),
            allowed=_fused(~constraints.allowed, row_of) == 0,
            row_of=row_of,
            most_configurations=constraints.most_configurations,
            limits=tuple(_fused_limit(limit, row_of) for limit in constraints.limits),
        )
        if not fused.allowed.any(axis=1).all():
            row = int(np.flatnonzero(~fused.allowed.any(axis=1))[0])
            raise InputError(
                f"no configuration is allowed for modules {np.flatnonzero(row_of == row).tolist()} together; "
                "allow one or leave them out of one group"
            )
        return fused

    @property
    def is_constrained(self) -> bool:
        """Whether anything but the budget limits an allocation."""
        alike = len(self.costs) < len(self.row_of)
        return alike or not self.allowed.all() or self.binding_count is not None or bool(self.limits)

    @property
    def smallest(self) -> np.ndarray:
        """The smallest allowed configuration of every row [rows]."""
        return np.where(self.allowed, self.sizes, np.iinfo(np.int64).max).argmin(axis=1)

    @property
    def largest(self) -> np.ndarray:
        """The largest allowed configuration of every row [rows]."""
        return np.where(self.allowed, self.sizes, -1).argmax(axis=1)

    def size_bytes(self, columns: np.ndarray, rows: Sequence[int] | None = None) -> int:
        """Total size of an allocation [rows], or of some of its rows."""
        size = np.take_along_axis(self.sizes, columns[:, None], axis=1)
        return int(size.sum() if rows is None else size[list(rows)].sum())

    def keeps(self, columns: np.ndarray, capacity: int) -> bool:
        """Whether an allocation [rows] is within the capacity and keeps every constraint."""
        return (
            bool(np.take_along_axis(self.allowed, columns[:, None], axis=1).all())
            and self.size_bytes(columns) <= capacity
            and (self.most_configurations is None or len(np.unique(columns)) <= self.most_configurations)
            and all(self.size_bytes(columns, limit.rows) <= limit.size_bytes for limit in self.limits)
        )

    def within(self, columns: np.ndarray) -> Program:
        """The program in which these columns are the only ones allowed."""
        chosen = np.isin(np.arange(self.allowed.shape[1]), columns)
        return replace(self, allowed=self.allowed & chosen, most_configurations=None)

    def as_knapsack(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Costs and sizes in which what is not allowed never fits `capacity`, and costs no less than what is."""
        dearest = np.where(self.allowed, self.costs, -math.inf).max(axis=1, keepdims=True)
        return np.where(self.allowed, self.costs, dearest), np.where(self.allowed, self.sizes, capacity + 1)

    @property
    def binding_count(self) -> int | None:
        """How many different configurations may be in use, None where the rows cannot use more anyway."""
        most = self.most_configurations
        usable = min(int(self.allowed.any(axis=0).sum()), len(self.costs))
        return most if most is not None and most < usable else None

    def column_sets(self) -> Iterator[np.ndarray]:
        """The largest sets of columns that may be in use together and that hold an allowed one for every row.

        Raises InputError where there are too many to look through.
        """
        most = self.binding_count
        alone, others = self._columns()
        if most is None:
            yield np.concatenate([alone, others])
        elif len(alone) <= most:
            count = math.comb(len(others), most - len(alone))
            if count > MAX_COLUMN_SETS:
                raise InputError(
                    f"at most {most} of {len(alone) + len(others)} configurations leaves {count:,} sets to look "
                    f"through, more than {MAX_COLUMN_SETS:,}; take configurations out of the menu or allow fewer"
                )
            for rest in itertools.combinations(others.tolist(), most - len(alone)):
                columns = np.array([*alone.tolist(), *rest], np.int64)
                if self.allowed[:, columns].any(axis=1).all():
                    yield columns

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns that are the only one of some row, and the others that some row may have."""
        only_one = self.allowed.sum(axis=1) == 1
        alone = self.allowed[only_one].any(axis=0)
        return np.flatnonzero(alone), np.flatnonzero(self.allowed.any(axis=0) & ~alone)


def row_of_modules(modules: int, groups: Iterable[Sequence[int]]) -> np.ndarray:
    """Row of every module [modules]: one for all that groups tie together, directly or through another group."""
    tied_to = list(range(modules))

    def first_of_row(module: int) -> int:
        while tied_to[module] != module:
            tied_to[module] = module = tied_to[tied_to[module]]
        return module

    for group in groups:
        firsts = {first_of_row(module) for module in group}
        tied_to_all = min(firsts, default=0)
        for first in firsts:
            tied_to[first] = tied_to_all
    return np.unique([first_of_row(module) for module in range(modules)], return_inverse=True)[1]


def solve_column_sets(program: Program, capacity: int) -> tuple[np.ndarray, float]:
    """Return the configuration of each row [rows] that costs least and fits, and a proven lower bound.

    Limits are not looked at. Some set must fit `capacity`.
    """
    parts = [part for part in map(program.within, program.column_sets()) if part.size_bytes(part.smallest) <= capacity]
    if len(parts) == 1:
        return solve_knapsack(*parts[0].as_knapsack(capacity), capacity)
    bounds = [lagrangian_bound(*part.as_knapsack(capacity), capacity).value for part in parts]
    best, best_cost, proven = None, math.inf, math.inf
    for bound, part in sorted(zip(bounds, parts, strict=True), key=itemgetter(0)):
        if bound >= best_cost:
            break
        columns, lower_bound = solve_knapsack(*part.as_knapsack(capacity), capacity)
        proven = min(proven, lower_bound)
        if (cost := total(program.costs, columns)) < best_cost:
            best, best_cost = columns, cost
    assert best is not None
    return best, proven


def smallest_choice(program: Program) -> np.ndarray | None:
    """The allocation [rows] of the smallest size that keeps every constraint; None if there is none."""
    candidates = [part.smallest for part in map(program.within, program.column_sets())]
    kept = [columns for columns in candidates if program.keeps(columns, program.size_bytes(columns))]
    return min(kept, key=program.size_bytes, default=None)


def _fused(table: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    fused = np.zeros((row_of.max() + 1, table.shape[1]), np.int64 if table.dtype == bool else table.dtype)
    np.add.at(fused, row_of, table)
    return fused


def _fused_limit(limit: Limit, row_of: np.ndarray) -> Limit:
    rows = np.unique(row_of[list(limit.rows)])
    if np.isin(row_of, rows).sum() != len(set(limit.rows)):
        raise InputError(f"{limit.name} cuts through a group of alike modules; give the group to one side")
    return replace(limit, rows=tuple(rows.tolist()))


def _check(constraints: ProgramConstraints, shape: tuple[int, ...]) -> None:
    if constraints.allowed.shape != shape or constraints.allowed.dtype != bool:
        raise InputError(
            f"allowed is {constraints.allowed.dtype} {constraints.allowed.shape}; it must be bool {shape}, "
            "[modules, configurations]"
        )
    if constraints.most_configurations is not None and constraints.most_configurations < 1:
        raise InputError(f"most_configurations = {constraints.most_configurations} is not positive; give 1 or more")
    for rows in (*constraints.groups, *(limit.rows for limit in constraints.limits)):
        if not all(0 <= row < shape[0] for row in rows):
            raise InputError(f"rows {list(rows)} of the constraints are not all among the {shape[0]} modules")
