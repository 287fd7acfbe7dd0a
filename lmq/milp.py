"""The budget program as a mixed-integer linear program, solved by HiGHS through PuLP.

MXQ equation 3: a 0/1 variable per (module, configuration), one configuration per module, total size within the
budget. This is the second, independent road to the optimum; `lmq.knapsack` is the fast one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp

from lmq.errors import LmqError

RELATIVE_GAP = 1e-9
INTEGRALITY = 1e-9
"""How far from 0 or 1 HiGHS may leave a variable: its own 1e-6, times millions of size units, is over the budget."""
TYPICAL_OBJECTIVE = 1e3
"""Costs are scaled so that the smallest choice costs this, far above the absolute tolerances of HiGHS."""


@dataclass(frozen=True, eq=False)
class _Program:
    problem: pulp.LpProblem
    variables: list[list[pulp.LpVariable]]


def solve_milp(
    costs: np.ndarray, sizes: np.ndarray, capacity: int, *, time_limit_s: float | None = None
) -> tuple[np.ndarray, float]:
    """Return the configuration of each module [modules] that costs least and fits, and the lower bound HiGHS proved.

    `costs` float64 and `sizes` int64 [modules, configurations]. The smallest choice must fit `capacity`, and is
    what comes back if the time limit passes before HiGHS has found any. Raises LmqError if HiGHS breaks the budget.
    """
    smallest = sizes.argmin(axis=1)
    rows = np.arange(len(sizes))
    least_costs, least_sizes = costs.min(axis=1, keepdims=True), sizes.min(axis=1, keepdims=True)
    extra_cost, extra_size, room = costs - least_costs, sizes - least_sizes, capacity - int(least_sizes.sum())
    scale = TYPICAL_OBJECTIVE / (float(extra_cost[rows, smallest].sum()) or 1.0)
    unit = max(int(np.gcd.reduce(extra_size, axis=None)), 1)
    program = _build(extra_cost * scale, extra_size // unit, room // unit)
    solver = pulp.HiGHS(
        msg=False,
        gapRel=RELATIVE_GAP,
        gapAbs=0.0,
        timeLimit=time_limit_s,
        threads=1,
        mip_feasibility_tolerance=INTEGRALITY,
        random_seed=0,
    )
    status = program.problem.solve(solver)
    choice = _chosen(program) if status == pulp.LpStatusOptimal else smallest
    if int(extra_size[rows, choice].sum()) > room:
        raise LmqError("HiGHS returned an allocation over the budget; solve with method='knapsack'")
    bound = program.problem.solverModel.getInfo().mip_dual_bound / scale + float(least_costs.sum())
    return choice, bound


def _build(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> _Program:
    modules, configurations = costs.shape
    problem = pulp.LpProblem("budget", pulp.LpMinimize)
    variables = [
        [problem.add_variable(f"x_{module}_{column}", cat=pulp.LpBinary) for column in range(configurations)]
        for module in range(modules)
    ]
    flat = [variable for row in variables for variable in row]
    problem += pulp.LpAffineExpression(zip(flat, costs.ravel().tolist(), strict=True))
    problem += pulp.LpAffineExpression(zip(flat, sizes.ravel().tolist(), strict=True)) <= capacity
    for row in variables:
        problem += pulp.LpAffineExpression((variable, 1) for variable in row) == 1
    return _Program(problem, variables)


def _chosen(program: _Program) -> np.ndarray:
    """The configuration whose variable is nearest to 1: HiGHS leaves traces like 1e-15 on the others."""
    return np.array([[variable.value() for variable in row] for row in program.variables]).argmax(axis=1)
