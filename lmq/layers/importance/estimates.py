"""All removal importance of a model at once, so that the estimators share the removals they have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lmq.layers.importance.leave_one_out import leave_one_out
from lmq.layers.importance.removal import RemovalValue
from lmq.layers.importance.shapley import Value, permutation_shapley, required_coalitions, window_shapley
from lmq.layers.importance.sublayers import layer_groups


@dataclass(frozen=True, kw_only=True)
class ShapleyOptions:
    """How Shapley values are estimated.

    `level`: windows of up to so many sub-layers, as the authors' program does. `permutations`: instead of windows, so
    many random orders by `seed`, which give standard errors.
    """

    level: int = 3
    permutations: int | None = None
    seed: int = 42

    def estimate(self, value: Value, players: int) -> list[tuple[float, float | None]]:
        """Value and standard error of every player; windows give no error.

        Raises InputError for a level or number of permutations that cannot be used.
        """
        if self.permutations is None:
            return [(found, None) for found in window_shapley(value, players, level=self.level)]
        estimates = permutation_shapley(value, players, permutations=self.permutations, seed=self.seed)
        return [(found.value, found.stderr) for found in estimates if found.value is not None]

    def check(self, players: int) -> None:
        """Raise InputError unless a game of so many players can be estimated; plays none."""
        self.estimate(lambda _: 0.0, players)


@dataclass(frozen=True, kw_only=True)
class RemovalImportance:
    """Rows of the tables of sub-layers and of layers (`leave_one_out` and `shapley` alone).

    `evaluations_unshared` is how many models the estimators ask for when each goes its own way.
    """

    sublayers: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    evaluations_unshared: int


def removal_importance(value: RemovalValue, options: ShapleyOptions) -> RemovalImportance:
    """Shapley values of sub-layers, and leave-one-out losses of sub-layers and of layers, in nats per token.

    A layer's Shapley value is the sum of its sub-layers'. Raises InputError for options that cannot be used.
    """
    players = len(value.players)
    pairs = layer_groups(players // 2)

    def shapley(game: Value) -> list[tuple[float, float | None]]:
        return options.estimate(game, players)

    def alone(game: Value) -> list[float]:
        return leave_one_out(game, players, [[player] for player in range(players)])

    def whole_layers(game: Value) -> list[float]:
        return leave_one_out(game, players, pairs)

    estimators: tuple[Callable[[Value], object], ...] = (shapley, alone, whole_layers)
    asked = [required_coalitions(estimator) for estimator in estimators]
    value.measure(chain.from_iterable(asked))
    values = shapley(value)
    rows = [
        {
            "layer": sublayer.layer,
            "sublayer": sublayer.name,
            "shapley": estimate,
            "shapley_stderr": stderr,
            "leave_one_out": loss,
        }
        for sublayer, (estimate, stderr), loss in zip(value.players, values, alone(value), strict=True)
    ]
    layers = [
        {"layer": layer, "leave_one_out": loss, "shapley": sum(values[player][0] for player in pair)}
        for layer, (pair, loss) in enumerate(zip(pairs, whole_layers(value), strict=True))
    ]
    return RemovalImportance(sublayers=rows, layers=layers, evaluations_unshared=sum(map(len, asked)))
