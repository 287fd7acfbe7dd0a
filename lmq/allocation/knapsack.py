"""Exact multiple-choice knapsack: one configuration per module, least total cost, total size within a capacity.

How it works, with c the costs, w the sizes, C the capacity and one allocation per module:

1. Lagrangian bound. For any multiplier λ >= 0 no feasible allocation costs less than
   L(λ) = Σ min_j (c + λ·w) − λ·C. The λ that maximises L is found exactly, by the secant method.
2. Excess. Choosing configuration j adds excess_j = (c_j + λ·w_j) − min (c + λ·w) >= 0. A feasible allocation costs
   L(λ) + Σ excess + λ·(unused capacity). So the allocations with a total excess of at most E hold every
   allocation that costs at most L(λ) + E.
3. Dynamic programme over the modules that have an alternative within E, keeping only states that no other state
   beats in size and cost. It runs from two sides and joins them, which keeps both state lists short.
4. When the best allocation found costs at most L(λ) + E it is optimal. Otherwise E grows and step 3 runs again.

Arithmetic is float64 in the costs, exact in the sizes. The optimum is proven to `RELATIVE_ROUNDING`.
Reference: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_STATES = 1_000_000
"""States of one list in the dynamic programme, before the beaten ones go, above which the search is given up."""
RELATIVE_ROUNDING = 1e-12
"""What float64 sums of costs may lose, relative to the sums that enter the bound: added to every excess limit."""
FIRST_CORE = 24
"""The first excess limit admits about this many alternative configurations."""
SMALLEST_FIRST_SHARE = 1e-3
"""The first excess limit is at least this share of the gap, so that few rounds reach the whole gap."""
GROWTH = 2.0
"""From one round to the next the excess limit grows by this factor."""


class _TooManyStates(Exception):
    """The dynamic programme would need more than `MAX_STATES` states."""


@dataclass(frozen=True, eq=False)
class LagrangianBound:
    """The best multiplier, the bound that it proves and an allocation that fits.

    `excess` [modules, configurations] is the excess of every configuration at the multiplier.
    """

    multiplier: float
    value: float
    excess: np.ndarray
    feasible: np.ndarray


@dataclass(frozen=True, eq=False)
class _Step:
    """One module added to a frontier that had `states_before` states.

    New state i is item `origins[i] // states_before` added to the earlier state `origins[i] % states_before`.
    """

    module: int
    items: np.ndarray
    states_before: int
    origins: np.ndarray


@dataclass(frozen=True, eq=False)
class _Frontier:
    """Partial allocations that no other beats: `size` rises, `cost` falls. Both count from the one of least excess."""

    size: np.ndarray
    excess: np.ndarray
    cost: np.ndarray
    steps: tuple[_Step, ...] = ()


def solve_knapsack(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, float]:
    """Return the configuration of each module [modules] that costs least and fits, and a proven lower bound.

    `costs` float64 and `sizes` int64 [modules, configurations]. The smallest allocation must fit `capacity`.
    The lower bound is below the cost of the allocation by what float64 sums may lose, and by more only where
    the search was given up because it needed too much memory: the allocation is then the best one found.
    """
    least_costs, least_sizes = costs.min(axis=1, keepdims=True), sizes.min(axis=1, keepdims=True)
    costs, sizes, capacity = costs - least_costs, sizes - least_sizes, capacity - int(least_sizes.sum())
    bound = lagrangian_bound(costs, sizes, capacity)
    best = bound.feasible
    gap = total(costs, best) - bound.value
    margin = RELATIVE_ROUNDING * (bound.value + 2 * bound.multiplier * capacity)
    limit = min(max(_first_limit(bound.excess), gap * SMALLEST_FIRST_SHARE), gap)
    searched = 0.0
    while gap > max(searched, margin):
        try:
            cheaper = _search(sizes, capacity, bound, limit + margin)
        except _TooManyStates:
            break
        searched = limit
        if cheaper is not None and total(costs, cheaper) < total(costs, best):
            best = cheaper
            gap = total(costs, best) - bound.value
        limit = min(limit * GROWTH, gap)
    return best, float(least_costs.sum()) + bound.value + min(searched, gap) - margin


def lagrangian_bound(costs: np.ndarray, sizes: np.ndarray, capacity: int) -> LagrangianBound:
    """Maximise the Lagrangian bound over the multiplier; see the module's docstring, steps 1 and 2."""
    fits = np.lexsort((costs, sizes), axis=1)[:, 0]
    over = np.lexsort((sizes, costs), axis=1)[:, 0]
    if total(sizes, over) <= capacity:
        excess = costs - costs.min(axis=1, keepdims=True)
        return LagrangianBound(0.0, total(costs, over), excess, over)
    while True:
        multiplier = (total(costs, fits) - total(costs, over)) / (total(sizes, over) - total(sizes, fits))
        reduced = costs + multiplier * sizes
        least = reduced.argmin(axis=1)
        if total(reduced, least) >= total(reduced, fits) - RELATIVE_ROUNDING * abs(total(reduced, fits)):
            break
        if total(sizes, least) <= capacity:
            fits = least
        else:
            over = least
    value = total(reduced, least) - multiplier * capacity
    return LagrangianBound(multiplier, value, reduced - reduced.min(axis=1, keepdims=True), fits)


def total(table: np.ndarray, columns: np.ndarray) -> float:
    """Sum of the chosen cell of each row; whole where the table is."""
    return table[np.arange(len(columns)), columns].sum().item()


def _first_limit(excess: np.ndarray) -> float:
    positive = excess[excess > 0]
    if positive.size <= FIRST_CORE:
        return float(positive.max(initial=0.0))
    return float(np.partition(positive, FIRST_CORE)[FIRST_CORE])


def _search(sizes: np.ndarray, capacity: int, bound: LagrangianBound, limit: float) -> np.ndarray | None:
    """Find the best feasible allocation among those with a total excess of at most `limit`; None if there is none."""
    base = bound.excess.argmin(axis=1)
    room = capacity - int(total(sizes, base))
    left = right = _Frontier(np.zeros(1, np.int64), np.zeros(1), np.zeros(1))
    for module in _core(bound.excess, limit):
        items = np.flatnonzero(bound.excess[module] <= limit)
        step = (module, items, sizes[module, items] - sizes[module, base[module]], bound.excess[module, items])
        if left.size.size <= right.size.size:
            left = _extend(left, *step, limit, bound.multiplier)
        else:
            right = _extend(right, *step, limit, bound.multiplier)
    ends = _join(left, right, room)
    if ends is None:
        return None
    columns = base.copy()
    for frontier, state in zip((left, right), ends, strict=True):
        _trace(frontier, state, columns)
    return columns


def _core(excess: np.ndarray, limit: float) -> np.ndarray:
    """Modules with more than one configuration within the limit, the most decided first."""
    if excess.shape[1] == 1:
        return np.zeros(0, np.int64)
    second = np.partition(excess, 1, axis=1)[:, 1]
    order = np.argsort(-second, kind="stable")
    return order[second[order] <= limit]


def _extend(
    frontier: _Frontier,
    module: int,
    items: np.ndarray,
    item_sizes: np.ndarray,
    item_excess: np.ndarray,
    limit: float,
    multiplier: float,
) -> _Frontier:
    """Add one module: every state with every item, without those over the limit and those beaten by another."""
    states = frontier.size.size
    if states * items.size > MAX_STATES:
        raise _TooManyStates
    size = (item_sizes[:, None] + frontier.size).ravel()
    excess = (item_excess[:, None] + frontier.excess).ravel()
    origins = np.flatnonzero(excess <= limit)
    origins = origins[np.argsort(size[origins], kind="stable")]
    size, excess = size[origins], excess[origins]
    cost = excess - multiplier * size
    better = np.ones(size.size, bool)
    better[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    kept = np.flatnonzero(better)
    last_of_size = np.ones(kept.size, bool)
    last_of_size[:-1] = size[kept[1:]] != size[kept[:-1]]
    kept = kept[last_of_size]
    return _Frontier(
        size[kept],
        excess[kept],
        cost[kept],
        (*frontier.steps, _Step(module, items, states, origins[kept].astype(np.int32))),
    )


def _join(left: _Frontier, right: _Frontier, room: int) -> tuple[int, int] | None:
    """The pair of states, one of each side, that fits `room` and costs least."""
    partner = np.searchsorted(right.size, room - left.size, side="right") - 1
    fitting = np.flatnonzero(partner >= 0)
    if fitting.size == 0:
        return None
    best = fitting[np.argmin(left.cost[fitting] + right.cost[partner[fitting]])]
    return int(best), int(partner[best])


def _trace(frontier: _Frontier, state: int, columns: np.ndarray) -> None:
    """Write into `columns` the items that led to a state."""
    for step in reversed(frontier.steps):
        item, state = divmod(int(step.origins[state]), step.states_before)
        columns[step.module] = step.items[item]
