import functools
import math
import random
from collections.abc import Callable
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError
from lmq.layers.importance.leave_one_out import leave_one_out
from lmq.layers.importance.shapley import (
    Value,
    exact_shapley,
    permutation_shapley,
    required_coalitions,
    window_shapley,
)


def random_game(players: int, seed: int = 0) -> Value:
    """Any worth for every set."""

    @functools.cache
    def value(coalition: frozenset[int]) -> float:
        return random.Random(f"{seed}/{sorted(coalition)}").gauss(0, 1)

    return value


def additive_game(worths: list[int]) -> Value:
    return lambda coalition: float(sum(worths[player] for player in coalition))


def by_enumeration(value: Value, players: int) -> list[float]:
    """The definition: the mean marginal over all orders."""
    totals = [0.0] * players
    for order in permutations(range(players)):
        present: set[int] = set()
        for player in order:
            before = value(frozenset(present))
            present.add(player)
            totals[player] += value(frozenset(present)) - before
    return [total / math.factorial(players) for total in totals]


def window_literally(value: Value, players: int, level: int) -> list[float]:
    """Player by player, window by window, as the estimator is described."""
    everyone = set(range(players))
    estimates = []
    for player in range(players):
        marginals = [value(frozenset(everyone)) - value(frozenset(everyone - {player}))]
        for length in range(2, level + 1):
            for first in (player, player - length + 1):
                window = set(range(first, first + length))
                if window <= everyone:
                    without_others = value(frozenset(everyone - (window - {player})))
                    marginals.append(without_others - value(frozenset(everyone - window)))
        estimates.append(sum(marginals) / len(marginals))
    return estimates


@pytest.mark.parametrize("players", [1, 3, 4])
def test_exact_values_equal_the_mean_over_all_orders(players: int) -> None:
    value = random_game(players)
    assert exact_shapley(value, players) == pytest.approx(by_enumeration(value, players))


@given(players=st.integers(1, 7), seed=st.integers(0, 100))
def test_exact_values_share_out_what_everyone_is_worth(players: int, seed: int) -> None:
    value = random_game(players, seed)
    worth = value(frozenset(range(players))) - value(frozenset())
    assert sum(exact_shapley(value, players)) == pytest.approx(worth)


def test_too_many_players_for_the_exact_value() -> None:
    with pytest.raises(InputError, match=r"13 players have 2\^13 sets.*at most 12.*window estimator"):
        exact_shapley(random_game(13), 13)


@pytest.mark.parametrize(("players", "level"), [(1, 1), (5, 1), (5, 3), (8, 3), (6, 6)])
def test_windows_equal_the_literal_description(players: int, level: int) -> None:
    value = random_game(players)
    assert window_shapley(value, players, level=level) == pytest.approx(window_literally(value, players, level))


def test_windows_of_one_are_leaving_one_out() -> None:
    value = random_game(6)
    assert window_shapley(value, 6, level=1) == leave_one_out(value, 6, [[player] for player in range(6)])


def test_groups_are_left_out_together() -> None:
    value = additive_game([1, 2, 4, 8])
    assert leave_one_out(value, 4, [(0, 1), (2, 3)]) == [3, 12]


@pytest.mark.parametrize("level", [0, 5])
def test_levels_that_are_no_window_are_refused(level: int) -> None:
    with pytest.raises(InputError, match=f"level = {level} is not a window length; allowed: 1 to 4"):
        window_shapley(random_game(4), 4, level=level)


def test_every_estimator_is_right_without_sampling_error_on_an_additive_game() -> None:
    worths = [3, -1, 4, 0, 5]
    value = additive_game(worths)
    assert exact_shapley(value, 5) == pytest.approx(worths)
    assert window_shapley(value, 5) == worths
    estimates = permutation_shapley(value, 5, permutations=7)
    assert [estimate.value for estimate in estimates] == worths
    assert {(estimate.stderr, estimate.samples) for estimate in estimates} == {(0.0, 7)}


def test_permutations_come_within_four_standard_errors() -> None:
    value = random_game(6)
    estimates = permutation_shapley(value, 6, permutations=400, seed=3)
    for estimate, exact in zip(estimates, exact_shapley(value, 6), strict=True):
        assert estimate.value is not None
        assert estimate.stderr is not None
        assert 0 < estimate.stderr < 0.2
        assert abs(estimate.value - exact) < 4 * estimate.stderr


def test_permutations_follow_the_seed() -> None:
    first, again, other = (permutation_shapley(random_game(5), 5, permutations=3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_truncated_permutations_remove_few_and_leave_players_without_samples() -> None:
    everyone = frozenset(range(10))

    def estimate(value: Value) -> object:
        return permutation_shapley(value, 10, permutations=3, max_removed=2)

    assert max(len(everyone - coalition) for coalition in required_coalitions(estimate)) == 2
    estimates = permutation_shapley(additive_game(list(range(10))), 10, permutations=3, max_removed=2)
    assert sum(found.samples for found in estimates) == 6
    for player, found in enumerate(estimates):
        assert found.value == (player if found.samples else None)
        assert (found.stderr is None) == (found.samples < 2)


@pytest.mark.parametrize("options", [{"permutations": 0}, {"max_removed": 0}, {"max_removed": 4}, {"seed": -1}])
def test_sampling_options_that_cannot_be_used_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="cannot be used: give at least 1 permutation, 1 to 3 players"):
        permutation_shapley(random_game(3), 3, **{"permutations": 2, **options})


@pytest.mark.parametrize("estimate", [exact_shapley, window_shapley])
def test_a_game_without_players_is_refused(estimate: Callable[[Value, int], object]) -> None:
    with pytest.raises(InputError, match="a game of 0 players"):
        estimate(random_game(1), 0)


def test_required_coalitions_are_what_the_estimator_asks_for() -> None:
    asked = []

    def value(coalition: frozenset[int]) -> float:
        asked.append(coalition)
        return 0.0

    window_shapley(value, 6, level=3)
    required = required_coalitions(lambda value: window_shapley(value, 6, level=3))
    assert len(required) == len(set(required)) == 1 + 6 + 5 + 4
    assert set(required) == set(asked)
