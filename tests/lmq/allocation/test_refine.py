import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.program import ProgramConstraints
from lmq.allocation.refine import LocalCosts, Refinement, RefineOptions, refine
from lmq.errors import InputError

MODULES, CONFIGURATIONS = 5, 3
SIZES_BYTES = np.tile(np.array([2, 3, 4]), (MODULES, 1))
BUDGET_BYTES = 3 * MODULES
ROWS = np.arange(MODULES)
MIDDLE = np.ones(MODULES, int)


class QuadraticLoss:
    """½ |Σ_m E[m, c_m]|² for random error vectors: additive but for cross terms, with exact local costs."""

    def __init__(self, seed: int, *, coupling: float = 1.0):
        generator = np.random.default_rng(seed)
        scale = np.array([2.0, 1.0, 0.5])[None, :, None] * generator.lognormal(0, 0.7, (MODULES, 1, 1))
        shared = coupling * generator.normal(size=(1, CONFIGURATIONS, 6))
        self.errors = scale * (generator.normal(size=(MODULES, CONFIGURATIONS, 6)) + shared)
        self.asked: list[tuple[int, ...]] = []

    def loss(self, columns: np.ndarray) -> float:
        self.asked.append(tuple(columns))
        return 0.5 * float(np.square(self.errors[ROWS, columns].sum(axis=0)).sum())

    def losses(self, columns: np.ndarray) -> np.ndarray:
        return np.array([self.loss(columns)])

    def local_costs(self, columns: np.ndarray) -> LocalCosts:
        now = self.errors[ROWS, columns]
        change = self.errors - now[:, None]
        return LocalCosts(change @ now.sum(axis=0), 0.5 * np.square(change).sum(axis=2))

    def refine(self, rounds: int = 6, **candidates: np.ndarray) -> Refinement:
        return refine(
            {"uniform": MIDDLE, **candidates},
            SIZES_BYTES,
            BUDGET_BYTES,
            uniform=MIDDLE,
            measured_losses=self.losses,
            local_costs=self.local_costs,
            options=RefineOptions(rounds=rounds),
        )


def size_bytes(columns: np.ndarray) -> int:
    return int(SIZES_BYTES[ROWS, columns].sum())


def least_loss(problem: QuadraticLoss) -> float:
    choices = (np.array(columns) for columns in itertools.product(range(CONFIGURATIONS), repeat=MODULES))
    return min(problem.loss(columns) for columns in choices if size_bytes(columns) <= BUDGET_BYTES)


@given(st.integers(0, 10_000))
def test_result_fits_the_budget_and_is_never_worse_than_a_candidate(seed: int) -> None:
    problem = QuadraticLoss(seed)
    other = np.array([2, 0, 2, 0, 1])
    refined = problem.refine(other=other)
    assert size_bytes(refined.columns) <= BUDGET_BYTES
    assert refined.loss == problem.loss(refined.columns)
    assert refined.loss <= min(problem.loss(MIDDLE), problem.loss(other))
    assert refined.gain_over_uniform == pytest.approx(problem.loss(MIDDLE) - refined.loss)
    assert refined.loss >= least_loss(problem) - 1e-12


def test_it_closes_most_of_the_distance_to_the_best_of_all_choices() -> None:
    closed = []
    for seed in range(40):
        problem = QuadraticLoss(seed)
        uniform, best = problem.loss(MIDDLE), least_loss(problem)
        if uniform - best > 1e-9:
            closed.append((uniform - problem.refine().loss) / (uniform - best))
    assert np.mean(closed) > 0.7


def test_no_rounds_choose_among_the_candidates() -> None:
    problem = QuadraticLoss(1)
    candidates = {"a": np.array([2, 0, 2, 0, 1]), "b": np.array([0, 2, 1, 1, 1])}
    refined = problem.refine(rounds=0, **candidates)
    assert refined.loss == min(problem.loss(columns) for columns in (MIDDLE, *candidates.values()))
    assert [step.origin for step in refined.tried] == ["uniform", "a", "b"]


def test_a_choice_that_nothing_improves_is_kept_without_measuring_it_again() -> None:
    problem = QuadraticLoss(2)
    best = problem.refine(rounds=20).columns
    problem.asked.clear()
    again = problem.refine(best=best)
    assert np.array_equal(again.columns, best)
    assert problem.asked.count(tuple(best)) == 1


def test_the_measured_loss_decides_even_where_the_costs_promise_a_gain() -> None:
    promise = LocalCosts(np.tile([-1.0, 0.0, -2.0], (MODULES, 1)), np.zeros((MODULES, CONFIGURATIONS)))
    refined = refine(
        {"uniform": MIDDLE},
        SIZES_BYTES,
        BUDGET_BYTES,
        uniform=MIDDLE,
        measured_losses=lambda columns: np.array([float((columns != 1).sum())]),
        local_costs=lambda _: promise,
    )
    assert np.array_equal(refined.columns, MIDDLE)
    assert refined.gain_over_uniform == 0.0
    assert len(refined.tried) > 1


def test_a_fall_within_its_standard_error_is_no_step() -> None:
    promise = LocalCosts(np.tile([-1.0, 0.0, -2.0], (MODULES, 1)), np.zeros((MODULES, CONFIGURATIONS)))

    def refined(falls: list[float]) -> Refinement:
        return refine(
            {"uniform": MIDDLE},
            SIZES_BYTES,
            BUDGET_BYTES,
            uniform=MIDDLE,
            measured_losses=lambda columns: np.full(3, 5.0) - np.array(falls) * (columns != 1).any(),
            local_costs=lambda _: promise,
            options=RefineOptions(rounds=1),
        )

    assert refined([0.3, 0.2, 0.1]).gain_over_uniform == pytest.approx(0.2)
    assert refined([0.5, -0.2, 0.1]).gain_over_uniform == 0.0


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "there are no candidates"),
        ({"uniform": MIDDLE, "boost": MIDDLE + 1}, "candidate 'boost' takes 20 bytes of a budget of 15"),
        ({"uniform": MIDDLE[:2]}, "one column per module"),
    ],
)
def test_bad_candidates_are_refused(candidates: dict[str, np.ndarray], message: str) -> None:
    problem = QuadraticLoss(0)
    with pytest.raises(InputError, match=message):
        refine(
            candidates,
            SIZES_BYTES,
            BUDGET_BYTES,
            uniform=MIDDLE,
            measured_losses=problem.losses,
            local_costs=problem.local_costs,
        )


def test_constraints_are_kept_and_uniform_is_only_what_the_gain_is_stated_against() -> None:
    allowed = np.ones((MODULES, CONFIGURATIONS), bool)
    allowed[0, :2] = False
    for seed in range(20):
        problem = QuadraticLoss(seed)
        start = np.array([2, 0, 1, 1, 1])
        refined = refine(
            {"start": start},
            SIZES_BYTES,
            BUDGET_BYTES,
            uniform=MIDDLE,
            measured_losses=problem.losses,
            local_costs=problem.local_costs,
            constraints=ProgramConstraints(allowed=allowed),
        )
        assert refined.columns[0] == 2
        assert all(step.columns[0] == 2 for step in refined.tried)
        assert refined.loss <= problem.loss(start)
        assert refined.uniform_loss == problem.loss(MIDDLE)
        assert size_bytes(refined.columns) <= BUDGET_BYTES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds = -1 is negative"),
        ({"cautions": ()}, "rising factors"),
        ({"cautions": (0.5, 2.0)}, "rising factors"),
        ({"cautions": (3.0, 1.5)}, "rising factors"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RefineOptions(**options)
