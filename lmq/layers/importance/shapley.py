"""Shapley values of the players of any game, by four estimators that know nothing of models.

A game is a value function v(S) of the set S of players that take part; players are numbered from 0. A player's
Shapley value is the mean of v(S ∪ i) − v(S) over all orders in which the players can come together. Give a
memoised value function (`functools.cache`): estimators ask for the same set many times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lmq.errors import InputError

Value = Callable[[frozenset[int]], float]
"""v(S): worth of the game when the players of S take part."""

MOST_PLAYERS_EXACT = 12


@dataclass(frozen=True, kw_only=True)
class ShapleyEstimate:
    """A player's estimated value and its standard error; None where the samples do not give one."""

    value: float | None
    stderr: float | None
    samples: int


def exact_shapley(value: Value, players: int) -> list[float]:
    """Shapley value of every player from all 2^players sets. Raises InputError for more than 12 players."""
    _check_players(players)
    if players > MOST_PLAYERS_EXACT:
        raise InputError(
            f"{players} players have 2^{players} sets, too many for the exact value (at most {MOST_PLAYERS_EXACT}); "
            "use the window estimator or permutations"
        )
    return [_exact_value(value, players, player) for player in range(players)]


def window_shapley(value: Value, players: int, *, level: int = 3) -> list[float]:
    """Estimate of every player from contiguous windows of 1 to `level` players, as Zhang, Dong and Kawaguchi do.

    A player's marginals are v(N) − v(N∖i) and, for each longer window W with i at one of its ends,
    v(N∖(W∖i)) − v(N∖W); the estimate is their plain mean. Only sets that lack at most `level` neighbours are asked
    for (early truncation: with more removed the value says little), so that the estimates do not add up to v(N) − v(∅).
    Source: arXiv 2409.14381, as its authors' program has it. Raises InputError for a level outside 1 to `players`.
    """
    _check_players(players)
    if not 1 <= level <= players:
        raise InputError(f"level = {level} is not a window length; allowed: 1 to {players}, the number of players")
    everyone = frozenset(range(players))
    marginals: list[list[float]] = [[] for _ in range(players)]
    for length in range(1, level + 1):
        for first in range(players - length + 1):
            window = frozenset(range(first, first + length))
            for end in {first, first + length - 1}:
                marginals[end].append(value(everyone - window | {end}) - value(everyone - window))
    return [math.fsum(found) / len(found) for found in marginals]


def permutation_shapley(
    value: Value, players: int, *, permutations: int, seed: int = 42, max_removed: int | None = None
) -> list[ShapleyEstimate]:
    """Estimate of every player from random orders in which the players leave, one after the other.

    Without bias: the expected marginal of a player is its Shapley value. The standard error is that of the mean over
    permutations. With `max_removed` each order is cut after so many players have left (early truncation). What is then
    estimated is another value, the mean marginal where at most so many players are missing, from fewer samples: a
    player that never was among the first has None. Raises InputError for numbers below 1.
    """
    _check_players(players)
    steps = players if max_removed is None else max_removed
    if permutations < 1 or not 1 <= steps <= players or seed < 0:
        raise InputError(
            f"permutations = {permutations}, max_removed = {max_removed}, seed = {seed} cannot be used: give at "
            f"least 1 permutation, 1 to {players} players to remove, and a seed of 0 or more"
        )
    generator = np.random.default_rng(seed)
    marginals: list[list[float]] = [[] for _ in range(players)]
    for _ in range(permutations):
        remaining = frozenset(range(players))
        for player in generator.permutation(players)[:steps].tolist():
            marginals[player].append(value(remaining) - value(remaining - {player}))
            remaining -= {player}
    return [_estimate(found) for found in marginals]


def required_coalitions(estimate: Callable[[Value], object]) -> list[frozenset[int]]:
    """The sets that an estimator asks for, in its order, each once: what can be evaluated together beforehand.

    `estimate` is an estimator with its options, as `lambda value: window_shapley(value, players, level=3)`.
    """
    asked: dict[frozenset[int], float] = {}
    estimate(lambda coalition: asked.setdefault(coalition, 0.0))
    return list(asked)


def _exact_value(value: Value, players: int, player: int) -> float:
    others = [other for other in range(players) if other != player]
    terms = []
    for size in range(players):
        weight = 1 / (players * math.comb(players - 1, size))
        for members in combinations(others, size):
            coalition = frozenset(members)
            terms.append(weight * (value(coalition | {player}) - value(coalition)))
    return math.fsum(terms)


def _estimate(marginals: list[float]) -> ShapleyEstimate:
    samples = len(marginals)
    mean = math.fsum(marginals) / samples if samples else None
    stderr = float(np.std(marginals, ddof=1)) / math.sqrt(samples) if samples > 1 else None
    return ShapleyEstimate(value=mean, stderr=stderr, samples=samples)


def _check_players(players: int) -> None:
    if players < 1:
        raise InputError(f"a game of {players} players has no Shapley values; give at least 1")
