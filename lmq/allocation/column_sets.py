"""At most k different configurations: solve the program for every set of k, the most promising first.

A menu of 12 has at most 924 sets of one size. The Lagrangian bound of a set (`lmq.allocation.knapsack`) is found in a
fraction of a millisecond and rules out nearly all; what it leaves is solved exactly, so the best one found is the
optimum.
"""

from __future__ import annotations

import math
from operator import itemgetter

import numpy as np

from lmq.allocation.knapsack import lagrangian_bound, solve_knapsack, total
from lmq.allocation.program import Program


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
        choice, lower_bound = solve_knapsack(*part.as_knapsack(capacity), capacity)
        proven = min(proven, lower_bound)
        if (cost := total(program.costs, choice)) < best_cost:
            best, best_cost = choice, cost
    assert best is not None
    return best, proven


def smallest_choice(program: Program) -> np.ndarray | None:
    """The choice [rows] of the smallest size that keeps every constraint; None if there is none."""
    candidates = [part.smallest for part in map(program.within, program.column_sets())]
    kept = [choice for choice in candidates if program.keeps(choice, program.size_bytes(choice))]
    return min(kept, key=program.size_bytes, default=None)
