"""Importance of whole layers: what each layer's activations say, and all of it joined into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lmq.layers.importance.avss import avss_scores
from lmq.layers.importance.cosine import angular_distances

_AVSS_VARIANTS = {
    "avss": ("variance", "sparsity"),
    "avss_pooled": ("pooled_variance", "sparsity"),
    "avss_relative": ("variance", "relative_sparsity"),
    "avss_pooled_relative": ("pooled_variance", "relative_sparsity"),
}


def layer_scores(activities: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """AVSS in its four variants and Block Influence, metric → one number per layer, from all rows of activity.

    Raises InputError when no layer's activations vary.
    """

    def column(name: str) -> list[float]:
        return [row[name] for row in activities]

    elements = activities[0]["elements"]
    avss = {
        name: avss_scores(column(variance), column(sparsity), elements=elements)
        for name, (variance, sparsity) in _AVSS_VARIANTS.items()
    }
    return {**avss, "block_influence": column("block_influence")}


def layer_importance_rows(
    activities: Sequence[Mapping[str, Any]],
    last_tokens: Sequence[Tensor],
    removal: Sequence[Mapping[str, Any]] | None,
) -> list[dict[str, Any]]:
    """Rows of the layer importance table, by layer.

    `last_tokens` [sequences, hidden] are those of `angular_distances`. `removal` has the `leave_one_out` and `shapley`
    of every layer; None: not measured. Raises InputError when no layer's activations vary, NotFiniteError.
    """
    scores = layer_scores(activities)
    distances = angular_distances(last_tokens, block_layers=1)
    return [
        {
            "layer": layer,
            "activation_variance": row["variance"],
            **{name: row[name] for name in ("pooled_variance", "sparsity", "relative_sparsity")},
            **{name: values[layer] for name, values in scores.items()},
            "angular_distance": distances[layer],
            "leave_one_out": removal[layer]["leave_one_out"] if removal else None,
            "shapley": removal[layer]["shapley"] if removal else None,
        }
        for layer, row in enumerate(activities)
    ]
