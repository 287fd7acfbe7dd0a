from __future__ import annotations

import itertools
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.error_table import ErrorTable
from lmq.allocation.frontier import budget_steps, frontier, uniform_points, within_target
from lmq.allocation.solver import Allocation
from lmq.allocation.strategies import Measurements, strategy
from lmq.allocation.targets import TARGETS
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import EMBEDDINGS, ModuleId, ModuleInfo
from lmq.report.figures.frontier import frontier_figures
from lmq.report.figures.standalone import standalone_svg
from lmq.report.results import VariantResult

MENU = (QuantSpec(4, 64), QuantSpec(2, 128), QuantSpec(8, 64), QuantSpec(3, 64))
MODULES = tuple(
    ModuleInfo(ModuleId(layer, kind), out, 128, "mlp_gate")
    for layer in range(3)
    for kind, out in (("mlp.down_proj", 128), ("mlp.up_proj", 192))
)


def measured(cost: np.ndarray) -> Measurements:
    """Measurements whose every error table has these costs [modules, configurations of the menu]."""
    sizes = np.array([[spec.size_bytes(module.parameters) for spec in MENU] for module in MODULES])
    table = ErrorTable(tuple(module.id for module in MODULES), MENU, cost, sizes)
    return Measurements(
        modules=MODULES, menu=MENU, costs=dict.fromkeys(("frobenius", "fisher", "sequence_fisher"), table)
    )


def costs(seed: int = 5) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(0, 1, (len(MODULES), 1))
    return drawn * np.array([[0.06, 1.0, 1e-4, 0.25]])


def least_cost(measurements: Measurements, budget_bytes: int) -> float:
    """Brute force over all 4096 allocations."""
    table = measurements.costs["frobenius"]
    assert table is not None
    rows = range(len(MODULES))
    return min(
        sum(table.cost[row, column] for row, column in zip(rows, choice, strict=True))
        for choice in itertools.product(range(len(MENU)), repeat=len(MODULES))
        if sum(int(table.size_bytes[row, column]) for row, column in zip(rows, choice, strict=True)) <= budget_bytes
    )


def test_every_point_is_the_least_of_all_allocations() -> None:
    measurements = measured(costs())
    budgets = budget_steps(measurements, 6)
    for point in frontier(strategy("mxq"), measurements, budgets):
        assert point.objective == pytest.approx(least_cost(measurements, point.budget_bytes), rel=1e-9)
        assert point.size_bytes <= point.budget_bytes
        assert point.lower_bound <= point.objective
        assert point.gap <= 1e-9


@given(st.integers(0, 2**20), st.integers(2, 12))
def test_more_bytes_never_cost_more_and_uniform_is_never_below(seed: int, points: int) -> None:
    measurements = measured(costs(seed))
    found = frontier(strategy("loss-aware", fisher="sequence"), measurements, budget_steps(measurements, points))
    objectives = [point.objective for point in found]
    assert objectives == sorted(objectives, reverse=True)
    uniform = uniform_points(strategy("loss-aware", fisher="sequence"), measurements)
    at_the_same_bytes = frontier(strategy("mxq"), measurements, [point.size_bytes for point in uniform.values()])
    for point, best in zip(uniform.values(), at_the_same_bytes, strict=True):
        assert best.objective <= point.objective * (1 + 1e-9)


@pytest.mark.parametrize("target", ["vllm", "gptq", "awq"])
def test_every_point_for_a_target_is_the_least_of_what_it_holds(target: str) -> None:
    """Brute force over all allocations of six modules; gate and up of a layer are alike where the target fuses them."""
    kinds = (("mlp.down_proj", 128), ("mlp.gate_proj", 64), ("mlp.up_proj", 64))
    modules = tuple(ModuleInfo(ModuleId(layer, kind), out, 128, "m") for layer in range(2) for kind, out in kinds)
    menu = (*MENU, QuantSpec(4, 32))
    sizes = np.array([[spec.size_bytes(module.parameters) for spec in menu] for module in modules])
    cost = np.random.default_rng(3).lognormal(0, 1, sizes.shape)
    table = ErrorTable(tuple(module.id for module in modules), menu, cost, sizes)
    engine = TARGETS[target]
    held = within_target(Measurements(modules=modules, menu=menu, costs={"frobenius": table}), engine)
    columns = [menu.index(spec) for spec in held.menu]
    assert held.menu == tuple(spec for spec in menu if spec.bits in engine.bits)
    kept = [
        choice
        for choice in itertools.product(columns, repeat=len(modules))
        if (not engine.alike or (choice[1] == choice[2] and choice[4] == choice[5]))
        and (engine.most_configurations is None or len(set(choice)) <= engine.most_configurations)
    ]
    rows = np.arange(len(modules))
    in_file = [
        [engine.size_bytes(spec, module.out_features, module.in_features) for spec in menu] for module in modules
    ]
    of_all = [(np.array(in_file)[rows, list(choice)].sum(), cost[rows, list(choice)].sum()) for choice in kept]
    for point in frontier(strategy("mxq"), held, budget_steps(held, 5)):
        assert point.objective == pytest.approx(min(c for size, c in of_all if size <= point.budget_bytes), rel=1e-9)
        assert point.gap <= 1e-9


def test_a_target_without_embeddings_refuses_those_that_were_measured() -> None:
    head = ModuleInfo(ModuleId(EMBEDDINGS, "lm_head"), 128, 128, "head")
    with pytest.raises(InputError, match="target 'gptq' holds no quantized embeddings, and"):
        within_target(Measurements(modules=(*MODULES, head), menu=MENU), TARGETS["gptq"])


def test_budgets_reach_from_the_smallest_to_the_largest_size() -> None:
    measurements = measured(costs())
    budgets = budget_steps(measurements, 5)
    parameters = [module.parameters for module in MODULES]
    assert budgets[0] == sum(QuantSpec(2, 128).size_bytes(count) for count in parameters)
    assert budgets[-1] == sum(QuantSpec(8, 64).size_bytes(count) for count in parameters)
    assert len(budgets) == 5
    assert max(np.diff(budgets)) - min(np.diff(budgets)) <= 1


def test_points_come_by_budget_whatever_the_order_asked_for() -> None:
    measurements = measured(costs())
    budgets = budget_steps(measurements, 5)
    found = frontier(strategy("mxq"), measurements, budgets[::-1])
    assert [point.budget_bytes for point in found] == budgets


def test_uniform_points_are_the_sums_of_their_columns() -> None:
    measurements = measured(costs())
    found = uniform_points(strategy("mxq"), measurements)
    assert list(found) == [QuantSpec(2, 128), QuantSpec(3, 64), QuantSpec(4, 64), QuantSpec(8, 64)]
    for spec, point in found.items():
        assert point.objective == pytest.approx(costs()[:, MENU.index(spec)].sum())
        assert point.size_bytes == sum(spec.size_bytes(module.parameters) for module in MODULES)


class TriesPlans:
    """A strategy that needs the model itself."""

    name: ClassVar[str] = "tries"
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs = frozenset({"trials"})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        raise AssertionError("must not be asked")


def test_what_has_no_frontier_is_refused() -> None:
    measurements = measured(costs())
    with pytest.raises(InputError, match=r"uniform solves no program .* such as loss-aware or mxq"):
        frontier(strategy("uniform"), measurements, budget_steps(measurements, 3))
    with pytest.raises(InputError, match=r"tries tries every allocation on the model"):
        frontier(TriesPlans(), measurements, budget_steps(measurements, 3))
    with pytest.raises(InputError, match="points = 1 draws no curve"):
        budget_steps(measurements, 1)
    with pytest.raises(InfeasibleBudget):
        frontier(strategy("mxq"), measurements, [10])


# ── the figure ───────────────────────────────────────────────────────────────────────────────────────────


def results(**changes: float | None) -> list[VariantResult]:
    full = VariantResult(model="m", strategy="full-precision", perplexity=20.0)
    size = sum(QuantSpec(4, 64).size_bytes(module.parameters) for module in MODULES)
    values = {"perplexity": 25.0, "kl_divergence": 0.2, "kl_divergence_stderr": 0.01} | changes
    return [
        full,
        VariantResult(model="m", strategy="uniform", size_bytes=size, **values),
        VariantResult(model="m", strategy="mxq", size_bytes=size, **values),
    ]


def figures(variants: list[VariantResult], *, costs_are_divergences: bool):
    measurements = measured(costs())
    chosen = strategy("mxq")
    return frontier_figures(
        frontier(chosen, measurements, budget_steps(measurements, 9)),
        uniform_points(chosen, measurements),
        variants,
        model="m",
        strategy="mxq",
        costs_are_divergences=costs_are_divergences,
    )


def heights(figure, strategy_marker: str) -> set[float]:
    return {
        round(float(line.get_ydata()[0]), 6)
        for line in figure.axes[0].lines
        if line.get_marker() == strategy_marker and len(line.get_ydata()) == 1
    }


def test_divergences_stand_beside_costs_only_where_they_share_a_unit() -> None:
    above, below = figures(results(), costs_are_divergences=True)
    assert heights(above, "o") == {0.2}
    assert heights(below, "o") == {round(float(np.log(25 / 20)), 6)}
    costs_alone, divergence, rise = figures(results(), costs_are_divergences=False)
    assert heights(costs_alone, "o") == set()
    assert heights(divergence, "o") == {0.2}
    assert heights(rise, "o") == {round(float(np.log(25 / 20)), 6)}
    assert costs_alone.axes[0].get_xlim() == divergence.axes[0].get_xlim() == rise.axes[0].get_xlim()


def test_the_curve_and_the_uniform_squares_stand_where_their_values_are() -> None:
    figure = figures([], costs_are_divergences=False)[0]
    measurements = measured(costs())
    points = frontier(strategy("mxq"), measurements, budget_steps(measurements, 9))
    curve = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(curve, [(point.size_bytes / 1e6, point.objective) for point in points])
    uniform = uniform_points(strategy("mxq"), measurements)
    assert heights(figure, "s") == {round(point.objective, 6) for point in uniform.values()}
    assert figure.axes[0].get_yscale() == "log"


def test_nothing_measured_leaves_its_panel_out() -> None:
    assert len(figures([], costs_are_divergences=False)) == 1
    assert len(figures(results(perplexity=None), costs_are_divergences=True)) == 1


def test_a_perplexity_below_full_precision_is_drawn_on_a_linear_scale() -> None:
    below = figures(results(perplexity=19.0), costs_are_divergences=True)[1]
    assert below.axes[0].get_yscale() == "linear"
    assert heights(below, "o") == {round(float(np.log(19 / 20)), 6)}


def test_the_picture_is_one_svg_file_with_both_panels() -> None:
    made = figures(results(), costs_are_divergences=True)
    text = standalone_svg(made)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert len(root.findall(f"{space}svg")) == 2
    words = [element.text for element in root.iter(f"{space}text")]
    assert "b4g64" in words
    assert "m: measured rise of log-perplexity, nats per token" in words
    assert text == standalone_svg(made)
