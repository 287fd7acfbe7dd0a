import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from lmq.allocation import knapsack
from lmq.allocation import solver as solver_module
from lmq.allocation.program import Limit, ProgramConstraints, row_of_modules
from lmq.allocation.solver import ALLOCATION_SCHEMA, Allocation, Assignment, solve
from lmq.errors import InfeasibleBudget, InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId
from lmq.tables import read_rows, write_rows

COSTS = np.array([[4.0, 2.0, 1.0], [40.0, 20.0, 10.0]])
SIZES = np.array([[10, 20, 30], [10, 20, 30]])


@st.composite
def programs(draw, most_modules: int = 5, most_configurations: int = 4):
    """Costs, sizes and a feasible budget: smooth, tied or of very different magnitudes."""
    shape = (draw(st.integers(1, most_modules)), draw(st.integers(1, most_configurations)))
    cost = draw(
        st.sampled_from(
            [
                st.floats(0, 1, width=32),
                st.integers(0, 4).map(float),
                st.floats(-8, 8).map(lambda exponent: 10**exponent),
                st.just(1.0),
            ]
        )
    )
    size = draw(st.sampled_from([st.integers(1, 6), st.integers(1, 10**7)]))
    count = shape[0] * shape[1]
    costs = np.array(draw(st.lists(cost, min_size=count, max_size=count))).reshape(shape)
    sizes = np.array(draw(st.lists(size, min_size=count, max_size=count))).reshape(shape)
    if draw(st.booleans()):
        costs, sizes = -np.sort(-costs, axis=1), np.sort(sizes, axis=1)
    smallest, largest = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    return costs, sizes, draw(st.integers(smallest, largest + 1))


def _trade_off(seed: int, modules: int, configurations: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs that fall as sizes rise, and a budget half-way: the search has to work."""
    generator = np.random.default_rng(seed)
    costs = -np.sort(-generator.random((modules, configurations)), axis=1)
    sizes = np.sort(generator.integers(1, 10**6, (modules, configurations)), axis=1)
    return costs, sizes, int(sizes.mean(axis=1).sum())


def _brute_force(costs, sizes, budget_bytes) -> float:
    rows = np.arange(len(costs))
    return min(
        math.fsum(costs[rows, list(choice)])
        for choice in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sizes[rows, list(choice)].sum() <= budget_bytes
    )


def _check(solution, costs, sizes, budget_bytes):
    rows = np.arange(len(costs))
    assert solution.objective == pytest.approx(costs[rows, solution.choice].sum(), rel=1e-12)
    assert solution.size_bytes == sizes[rows, solution.choice].sum() <= budget_bytes
    assert solution.lower_bound <= solution.objective


@settings(max_examples=300, deadline=None)
@given(programs())
def test_knapsack_agrees_with_brute_force(program):
    solution = solve(*program)
    _check(solution, *program)
    assert solution.objective == pytest.approx(_brute_force(*program), rel=1e-9, abs=1e-300)
    assert solution.gap <= 1e-9


@settings(max_examples=25, deadline=None)
@given(programs(most_modules=4))
def test_highs_agrees_with_brute_force(program):
    solution = solve(*program, method="highs")
    _check(solution, *program)
    assert solution.objective == pytest.approx(_brute_force(*program), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_both_methods_agree_on_larger_tables(seed):
    generator = np.random.default_rng(seed)
    parameters = generator.choice([576 * 576, 576 * 192, 576 * 1536], 40)
    sizes = np.array([[spec.size_bytes(int(count)) for spec in STOPS] for count in parameters])
    decay = np.array([2.0 ** (-2 * spec.bits) * (1 + spec.group_size / 64) for spec in STOPS])
    costs = generator.lognormal(0, 2, 40)[:, None] * decay * generator.lognormal(0, 0.2, (40, 12))
    budget_bytes = int(parameters.sum() * (2.6 + seed) / 8)
    exact, highs = (solve(costs, sizes, budget_bytes, method=method) for method in ("knapsack", "highs"))
    assert exact.gap <= 1e-9
    assert exact.objective == pytest.approx(highs.objective, rel=1e-8)
    assert highs.lower_bound <= exact.objective * (1 + 1e-9)


def test_the_order_of_modules_and_configurations_does_not_matter():
    costs, sizes, budget_bytes = _trade_off(1, 30, 6)
    generator = np.random.default_rng(2)
    rows, columns = generator.permutation(30), generator.permutation(6)
    shuffled = solve(costs[np.ix_(rows, columns)], sizes[np.ix_(rows, columns)], budget_bytes)
    assert shuffled.objective == pytest.approx(solve(costs, sizes, budget_bytes).objective, rel=1e-12)


def test_a_callers_tables_are_not_changed():
    costs, sizes = COSTS.copy(), SIZES.copy()
    solve(costs, sizes, 45)
    assert np.array_equal(costs, COSTS)
    assert np.array_equal(sizes, SIZES)


def test_plain_lists_and_identical_modules_work():
    solution = solve([[3.0, 1.0]] * 50, [[10, 20]] * 50, 755)
    assert solution.objective == 25 * 3 + 25 * 1
    assert solution.size_bytes == 750


def test_a_generous_budget_takes_the_cheapest():
    solution = solve(COSTS, SIZES, 10**15)
    assert solution.choice.tolist() == [2, 2]
    assert solution.gap == 0


@pytest.mark.parametrize("method", ["knapsack", "highs"])
def test_an_infeasible_budget_names_the_feasible_range(method):
    with pytest.raises(InfeasibleBudget, match=r"smallest feasible budget of 20 bytes.*20 to 60") as caught:
        solve(COSTS, SIZES, 19, method=method)
    assert (caught.value.smallest_bytes, caught.value.largest_bytes) == (20, 60)
    assert solve(COSTS, SIZES, 20, method=method).choice.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("costs", "sizes", "budget", "message"),
    [
        ([[1.0, math.nan]], [[1, 2]], 2, "module 0, configuration 1"),
        ([[1.0, math.inf]], [[1, 2]], 2, "1 of 2 costs are not finite"),
        ([[1.0, 2.0]], [[1, -2]], 2, "size -2 at module 0, configuration 1 is not positive"),
        ([[1.0, 2.0]], [[0, 2]], 2, "size 0"),
        ([[1.0, 2.0]], [[1.5, 2]], 2, "whole numbers"),
        ([[1.0, 2.0]], [[1.0, math.nan]], 2, "whole numbers"),
        ([[1.0, 2.0]], [[1, 2, 3]], 2, r"shape \(1, 2\) and sizes \(1, 3\)"),
        ([1.0, 2.0], [1, 2], 2, "at least one of each"),
        (np.zeros((0, 3)), np.zeros((0, 3), int), 2, "at least one of each"),
        ([[1.0, 2.0]], [[1, 2]], math.nan, "not a number of bytes"),
    ],
)
def test_bad_tables_are_refused(costs, sizes, budget, message):
    with pytest.raises(InputError, match=message):
        solve(costs, sizes, budget)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'knapsack'"):
        solve(COSTS, SIZES, 45, method="knapsak")


def test_highs_takes_over_and_says_what_is_proven(monkeypatch, caplog):
    costs, sizes, budget_bytes = _trade_off(3, 12, 4)
    exact = solve(costs, sizes, budget_bytes)
    monkeypatch.setattr(knapsack, "MAX_STATES", 0)
    fallen = solve(costs, sizes, budget_bytes)
    assert "continuing with HiGHS" in caplog.text
    assert fallen.objective == pytest.approx(exact.objective, rel=1e-9)
    assert fallen.gap <= 1e-8


def test_without_proof_the_gap_is_honest(monkeypatch):
    costs, sizes, budget_bytes = _trade_off(3, 12, 4)
    exact = solve(costs, sizes, budget_bytes)
    monkeypatch.setattr(knapsack, "MAX_STATES", 0)
    monkeypatch.setattr(
        solver_module, "solve_milp", lambda program, capacity, start, **_: (program.smallest, -math.inf)
    )
    stopped = solve(costs, sizes, budget_bytes)
    assert stopped.lower_bound <= exact.objective <= stopped.objective
    assert stopped.gap > 1e-9


def test_an_allocation_survives_its_table(tmp_path):
    assignments = tuple(
        Assignment(
            ModuleId(layer, "mlp.up_proj"), QuantSpec(bits, 64), 4096, QuantSpec(bits, 64).size_bytes(4096), *rest
        )
        for layer, bits, rest in [(0, 3, (0.5, False)), (1, 4, (None, True))]
    )
    allocation = Allocation(assignments=assignments, objective=0.5, lower_bound=0.5)
    write_rows(tmp_path / "allocation.parquet", ALLOCATION_SCHEMA, allocation.to_rows())
    rows = read_rows(tmp_path / "allocation.parquet", ALLOCATION_SCHEMA)
    assert Allocation.from_rows(rows, objective=0.5, lower_bound=0.5) == allocation
    assert allocation.gap == 0
    assert Allocation.from_rows(rows).gap is None
    assert list(allocation.specs) == [ModuleId(0, "mlp.up_proj"), ModuleId(1, "mlp.up_proj")]
    assert allocation.bits_per_weight == 8 * allocation.size_bytes / 8192


def test_optimum_of_zero_among_large_costs_is_proven_without_a_second_solver(caplog):
    costs = np.array([[5.0, 0.0, -3.0], [4.0, 0.0, 7.0], [3.0, 0.0, 6.0]])
    sizes = np.array([[1, 2, 9], [1, 2, 9], [1, 2, 9]])
    solution = solve(costs, sizes, 6)
    assert solution.objective == 0.0
    assert solution.size_bytes == 6
    assert not caplog.records


def _constrained(seed: int, modules: int, configurations: int, most: int | None) -> ProgramConstraints:
    """Two thirds of the cells allowed, the first and the middle column everywhere, and triples of alike modules."""
    allowed = np.random.default_rng(seed).random((modules, configurations)) < 2 / 3
    allowed[:, [0, configurations // 2]] = True
    groups = tuple((row, row + 1, row + 2) for row in range(0, modules - 2, 4))
    return ProgramConstraints(allowed=allowed, groups=groups, most_configurations=most)


@pytest.mark.parametrize("most", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_both_methods_agree_under_constraints(seed, most):
    costs, sizes, budget_bytes = _trade_off(seed, 16, 5)
    constraints = _constrained(seed, 16, 5, most)
    exact = solve(costs, sizes, budget_bytes, constraints=constraints)
    highs = solve(costs, sizes, budget_bytes, constraints=constraints, method="highs")
    _check(exact, costs, sizes, budget_bytes)
    assert exact.gap <= 1e-9
    assert exact.objective == pytest.approx(highs.objective, rel=1e-8)
    for solution in (exact, highs):
        assert constraints.allowed[np.arange(16), solution.choice].all()
        assert all(len(set(solution.choice[list(group)])) == 1 for group in constraints.groups)
        assert most is None or len(set(solution.choice)) <= most


def test_constraints_that_allow_everything_change_nothing():
    costs, sizes, budget_bytes = _trade_off(5, 20, 5)
    everything = ProgramConstraints(
        allowed=np.ones(costs.shape, bool),
        groups=((3,), ()),
        most_configurations=5,
        limits=(Limit(name="none", rows=(), size_bytes=1),),
    )
    free = solve(costs, sizes, budget_bytes)
    bound = solve(costs, sizes, budget_bytes, constraints=everything)
    assert bound.objective == pytest.approx(free.objective, rel=1e-9)


def test_highs_takes_over_under_constraints(monkeypatch, caplog):
    costs, sizes, budget_bytes = _trade_off(3, 12, 4)
    constraints = _constrained(3, 12, 4, 2)
    exact = solve(costs, sizes, budget_bytes, constraints=constraints)
    monkeypatch.setattr(knapsack, "MAX_STATES", 0)
    fallen = solve(costs, sizes, budget_bytes, constraints=constraints)
    assert "continuing with HiGHS" in caplog.text
    assert fallen.objective == pytest.approx(exact.objective, rel=1e-9)


def test_what_is_not_allowed_costs_no_precision():
    costs = np.array([[1.0, 1e300], [2.0, 1.0]])
    allowed = np.array([[True, False], [True, True]])
    solution = solve(costs, [[1, 2], [1, 2]], 3, constraints=ProgramConstraints(allowed=allowed))
    assert (solution.choice.tolist(), solution.objective) == ([0, 1], 2.0)


def test_what_is_not_allowed_is_not_taken_for_an_equal():
    constraints = ProgramConstraints(allowed=np.array([[False, True]]))
    assert solve([[5.0, 5.0]], [[1, 1]], 1, constraints=constraints).choice.tolist() == [1]


def test_groups_that_overlap_are_one():
    groups = ((0, 1), (2, 3), (1, 2))
    constraints = ProgramConstraints(allowed=np.ones((5, 2), bool), groups=groups)
    solution = solve(
        [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [[1, 1]] * 5, 5, constraints=constraints
    )
    assert solution.choice.tolist() == [1, 1, 1, 1, 0]


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.lists(st.integers(0, n - 1), max_size=4))))
)
def test_rows_are_the_connected_components_of_the_groups(drawn):
    modules, groups = drawn
    edges = np.zeros((modules, modules))
    for group in groups:
        edges[np.ix_(group, group)] = 1
    labels = connected_components(edges, directed=False)[1]
    first_seen = list(dict.fromkeys(labels.tolist()))
    assert row_of_modules(modules, groups).tolist() == [first_seen.index(label) for label in labels.tolist()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allowed": np.ones((2, 2), bool)}, r"bool \(2, 2\); it must be bool \(2, 3\)"),
        ({"allowed": np.ones((2, 3))}, "allowed is float64"),
        ({"groups": ((0, 2),)}, r"rows \[0, 2\] of the constraints are not all among the 2 modules"),
        ({"most_configurations": 0}, "most_configurations = 0 is not positive"),
        ({"limits": (Limit(name="the limit", rows=(0,), size_bytes=9),), "groups": ((0, 1),)}, "cuts through a group"),
        (
            {"allowed": np.array([[True, False, False], [False, True, True]]), "groups": ((0, 1),)},
            r"modules \[0, 1\] tog",
        ),
        (
            {"allowed": np.array([[True, False, False], [False, True, True]]), "most_configurations": 1},
            "no allocation keeps at most 1 different configurations together",
        ),
    ],
)
def test_constraints_that_no_choice_keeps_are_refused(change, message):
    constraints = ProgramConstraints(**{"allowed": np.ones((2, 3), bool), **change})
    with pytest.raises(InputError, match=message):
        solve(COSTS, SIZES, 45, constraints=constraints)


def test_more_sets_of_configurations_than_can_be_looked_through_are_refused():
    constraints = ProgramConstraints(allowed=np.ones((24, 24), bool), most_configurations=12)
    with pytest.raises(InputError, match="at most 12 of 24 configurations leaves 2,704,156 sets"):
        solve(np.ones((24, 24)), np.ones((24, 24), int), 24, constraints=constraints)
