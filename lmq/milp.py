"""The budget program as a mixed-integer linear program, solved by HiGHS through PuLP.

MXQ equation 3: a 0/1 variable per (module, configuration), one configuration per module, total size within the
budget. It is the second, independent road to the optimum; `lmq.knapsack` is the fast one.
"""

from __future__ import annotations

import numpy as np
import pulp

from lmq.errors import LmqError

RELATIVE_GAP = 1e-9
INTEGRALITY = 1e-9
"""How far from 0 or 1 HiGHS may leave a variable. Its own 1e-6 times millions of size units is over the budget."""
TYPICAL_OBJECTIVE = 1e3
"""Costs are scaled to a sum of about this, far above HiGHS' absolute tolerances."""


def solve_milp(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, float]:
    """Return the configuration of each module [modules] that costs least and fits, and a proven lower bound.

    `costs` float64 and `sizes` int64 [modules, configurations]. The smallest choice must fit `capacity`.
    Raises LmqError if HiGHS stops without a proven optimum.
    """
    least_costs = costs.min(axis=1)
    extra = costs - least_costs[:, None]
    scale = TYPICAL_OBJECTIVE / max(float(extra[np.arange(len(sizes)), sizes.argmin(axis=1)].sum()), np.finfo(float).tiny)
    unit, sizes, capacity = _whole_units(sizes, capacity)
    program, variables = _program(extra * scale, sizes, capacity)
    solver = pulp.HiGHS(
        msg=False, gapRel=RELATIVE_GAP, gapAbs=0.0, mip_feasibility_tolerance=INTEGRALITY, threads=1, random_seed=0
    )
    status = program.solve(solver)
    if status != pulp.LpStatusOptimal:
        raise LmqError(f"HiGHS stopped without an optimum ({pulp.LpStatus[status]}); use method='knapsack'")
    values = np.array([[variable.value() for variable in row] for row in variables])
    choice = values.argmax(axis=1)
    return choice, program.solverModel.getInfo().mip_dual_bound / scale + float(least_costs.sum())
