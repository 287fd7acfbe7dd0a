"""Leave-one-out losses: what the model loses when a sub-layer, or a whole layer, is removed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lmq.layers.importance.shapley import Value


def leave_one_out(value: Value, players: int, groups: Sequence[Collection[int]]) -> list[float]:
    """v(N) − v(N∖G) for every group G of players that are removed together.

    With v the negative loss (`lmq.layers.importance.removal`), the loss without the group minus the loss of the full
    model, in nats per token. For sub-layers the groups are `[[0], [1], …]`, for layers `layer_groups`.
    """
    everyone = frozenset(range(players))
    return [value(everyone) - value(everyone.difference(group)) for group in groups]
