"""The frontier: what a strategy's program predicts at every budget, from one set of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmq.allocation.budget import module_sizes
from lmq.allocation.solver import Allocation, relative_gap
from lmq.allocation.strategies.base import Measurements, Strategy
from lmq.allocation.targets import Target, restrict_menu
from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import EMBEDDINGS


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Least predicted cost within a budget: its objective, a proven lower bound of any, and the bytes it takes."""

    budget_bytes: int
    size_bytes: int
    objective: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far the objective may be above the optimum, relative to the objective."""
        return relative_gap(self.objective, self.lower_bound)


def budget_steps(measurements: Measurements, points: int) -> list[int]:
    """`points` budgets in bytes, evenly from the smallest size that any allocation has to the largest.

    Raises InputError for fewer than 2 points.
    """
    if points < 2:
        raise InputError(f"points = {points} draws no curve; give 2 or more")
    sizes = module_sizes(measurements.modules, measurements.menu, measurements.target)
    smallest, largest = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    return [smallest + (largest - smallest) * step // (points - 1) for step in range(points)]


def within_target(measurements: Measurements, target: Target) -> Measurements:
    """The same measurements with what the target holds of the menu, its sizes, and its constraints beside their own.

    Raises InputError where it holds none of the menu, or no quantized embeddings where there are some.
    """
    around = [module.id for module in measurements.modules if module.id.layer == EMBEDDINGS]
    if around and not target.embeddings:
        raise InputError(f"target {target.name!r} holds no quantized embeddings, and {around[0]} was measured")
    kept = measurements.constraints
    most = [most for most in (kept.most_configurations, target.most_configurations) if most is not None]
    constraints = replace(
        kept, alike=tuple(dict.fromkeys((*kept.alike, *target.alike))), most_configurations=min(most, default=None)
    )
    menu = restrict_menu(measurements.menu, target, measurements.modules)
    return replace(measurements, menu=menu, constraints=constraints, target=target)


def frontier(chosen: Strategy, measurements: Measurements, budgets: Sequence[int]) -> list[FrontierPoint]:
    """Solve the strategy's program for every budget in bytes; points by budget, their objectives never rise.

    The unit of the objective is that of the strategy's costs. Raises InputError for a strategy that solves no program
    or tries allocations on the model, InfeasibleBudget as the strategy does.
    """
    solved: list[FrontierPoint] = []
    for budget_bytes in sorted(budgets):
        point = _point(chosen, measurements, budget_bytes)
        if solved and solved[-1].objective < point.objective:
            # within the solver's tolerance the allocation of a smaller budget may cost less: it fits here as well
            point = replace(solved[-1], budget_bytes=budget_bytes, lower_bound=point.lower_bound)
        solved.append(point)
    return solved


def uniform_points(chosen: Strategy, measurements: Measurements) -> dict[QuantSpec, FrontierPoint]:
    """What the strategy's costs predict for each configuration of the menu given to every module, by size."""
    totals = module_sizes(measurements.modules, measurements.menu, measurements.target).sum(axis=0).tolist()
    by_size = sorted(zip(totals, measurements.menu, strict=True))
    return {spec: _point(chosen, replace(measurements, menu=(spec,)), size) for size, spec in by_size}


def _point(chosen: Strategy, measurements: Measurements, budget_bytes: int) -> FrontierPoint:
    if "trials" in chosen.needs:
        raise InputError(f"{chosen.name} tries every allocation on the model; {_PROGRAMS}")
    allocation: Allocation = chosen.allocate(measurements, budget_bytes)
    if allocation.objective is None or allocation.lower_bound is None:
        raise InputError(f"{chosen.name} solves no program and predicts no cost; {_PROGRAMS}")
    return FrontierPoint(
        budget_bytes=budget_bytes,
        size_bytes=allocation.size_bytes,
        objective=allocation.objective,
        lower_bound=allocation.lower_bound,
    )


_PROGRAMS = "a frontier is drawn of strategies that solve a program for costs, such as loss-aware or mxq"
