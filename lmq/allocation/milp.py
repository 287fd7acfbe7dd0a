"""The budget program as a mixed-integer linear program, solved by HiGHS through PuLP.

MXQ equation 3: a 0/1 variable per (module, configuration), one configuration per module, total size within the
budget. This is the second, independent road to the optimum; `lmq.allocation.knapsack` is the fast one. It is the only
one for bytes limits of some modules: one more row each. At most k different configurations take one 0/1 variable per
configuration, which every use of that configuration must be below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp

from lmq.allocation.program import Program
from lmq.errors import LmqError

RELATIVE_GAP = 1e-9
INTEGRALITY = 1e-9
"""How far from 0 or 1 HiGHS may leave a variable: its own 1e-6, times millions of size units, is over the budget."""
TYPICAL_OBJECTIVE = 1e3
"""Costs are scaled so that the smallest allocation costs this, far above the absolute tolerances of HiGHS."""


@dataclass(frozen=True, eq=False)
class _Milp:
    """`cells` [variables, 2] are the allowed (row, configuration) pairs, each with its 0/1 variable."""

    problem: pulp.LpProblem
    cells: np.ndarray
    variables: list[pulp.LpVariable]


def solve_milp(
    program: Program, capacity: int, start: np.ndarray, *, time_limit_s: float | None = None
) -> tuple[np.ndarray, float]:
    """Return the configuration of each row [rows] that costs least and fits, and the lower bound HiGHS proved.

    `start` [rows] must fit `capacity` and keep the constraints; it is what comes back if the time limit passes
    before HiGHS has found any other. Raises LmqError if HiGHS breaks the budget or a constraint.
    """
    least_costs = np.where(program.allowed, program.costs, np.inf).min(axis=1, keepdims=True)
    extra_cost = program.costs - least_costs
    scale = TYPICAL_OBJECTIVE / (float(np.take_along_axis(extra_cost, program.smallest[:, None], axis=1).sum()) or 1.0)
    milp = _build(program, extra_cost * scale, capacity)
    solver = pulp.HiGHS(
        msg=False,
        gapRel=RELATIVE_GAP,
        gapAbs=0.0,
        timeLimit=time_limit_s,
        threads=1,
        mip_feasibility_tolerance=INTEGRALITY,
        random_seed=0,
    )
    status = milp.problem.solve(solver)
    columns = _chosen(milp) if status == pulp.LpStatusOptimal else start
    if status == pulp.LpStatusInfeasible or not program.keeps(columns, capacity):
        raise LmqError(
            "HiGHS called a feasible program infeasible, or its allocation breaks the budget or a constraint; "
            "solve with method='knapsack' and without limits"
        )
    bound = milp.problem.solverModel.getInfo().mip_dual_bound / scale + float(least_costs.sum())
    return columns, bound


def _build(program: Program, costs: np.ndarray, capacity: int) -> _Milp:
    problem = pulp.LpProblem("budget", pulp.LpMinimize)
    cells = np.argwhere(program.allowed)
    variables = [problem.add_variable(f"x_{row}_{column}", cat=pulp.LpBinary) for row, column in cells.tolist()]
    milp = _Milp(problem, cells, variables)
    problem += pulp.LpAffineExpression(zip(variables, costs[program.allowed].tolist(), strict=True))
    _limit_size(milp, program, np.arange(len(costs)), capacity)
    for limit in program.limits:
        _limit_size(milp, program, np.array(limit.rows, np.int64), limit.size_bytes)
    for row in range(len(costs)):
        problem += pulp.LpAffineExpression((variables[cell], 1) for cell in np.flatnonzero(cells[:, 0] == row)) == 1
    if program.binding_count is not None:
        _limit_configurations(milp, program.binding_count)
    return milp


def _limit_size(milp: _Milp, program: Program, rows: np.ndarray, size_bytes: int) -> None:
    """Σ size of the rows within `size_bytes`, counted above the smallest allocation and in the largest whole unit."""
    smallest = np.take_along_axis(program.sizes, program.smallest[:, None], axis=1)
    extra_size = (program.sizes - smallest)[program.allowed]
    used = np.flatnonzero(np.isin(milp.cells[:, 0], rows) & (extra_size > 0))
    room = size_bytes - int(smallest[rows].sum())
    unit = max(int(np.gcd.reduce(extra_size[used], initial=0)), 1)
    terms = ((milp.variables[cell], int(extra_size[cell]) // unit) for cell in used)
    milp.problem.addConstraint(pulp.LpAffineExpression(terms) <= room // unit)


def _limit_configurations(milp: _Milp, most: int) -> None:
    """At most `most` configurations in use: x[row, column] ≤ y[column], Σ y ≤ most."""
    in_use = {
        column: milp.problem.add_variable(f"y_{column}", cat=pulp.LpBinary)
        for column in np.unique(milp.cells[:, 1]).tolist()
    }
    milp.problem.addConstraint(pulp.LpAffineExpression((variable, 1) for variable in in_use.values()) <= most)
    for (_, column), variable in zip(milp.cells.tolist(), milp.variables, strict=True):
        milp.problem.addConstraint(variable <= in_use[column])


def _chosen(milp: _Milp) -> np.ndarray:
    """The configuration whose variable is nearest to 1: HiGHS leaves traces like 1e-15 on the others."""
    values = np.full(milp.cells.max(axis=0) + 1, -1.0)
    values[milp.cells[:, 0], milp.cells[:, 1]] = [variable.value() for variable in milp.variables]
    return values.argmax(axis=1)
