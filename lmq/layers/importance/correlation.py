"""Rank correlations between importance metrics: whether they put the layers in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

FEWEST_LAYERS = 3
"""Two layers always correlate fully."""


def rank_correlations(metrics: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, float | None]]:
    """Spearman's ρ of every pair of metrics, metric → metric → ρ, over the layers that both have.

    Each metric is one number per layer; None and NaN are not measured. ρ is None where it is not defined: fewer than
    3 layers in common, or a metric that is the same for all of them.
    """
    values = {name: np.array(column, dtype=np.float64) for name, column in metrics.items()}
    return {first: {second: _spearman(values[first], values[second]) for second in values} for first in values}


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    common = ~(np.isnan(first) | np.isnan(second))
    first, second = first[common], second[common]
    if len(first) < FEWEST_LAYERS or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    from scipy.stats import spearmanr  # takes seconds to import

    return float(spearmanr(first, second).statistic)
