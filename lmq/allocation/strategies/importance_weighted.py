"""MXQ with the weight errors of important layers counting more: two strategies of ours, after published metrics.

The metrics were published to choose layers to remove. That they say how well a layer bears quantization is an
assumption here, which a run tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmq.allocation.solver import Allocation
from lmq.allocation.strategies.base import Choices, Measurements, not_measured, solve_program, table_costs
from lmq.errors import InputError


@dataclass(frozen=True, kw_only=True)
class _ImportanceWeighted:
    """MXQ with each norm multiplied by the importance of the module's layer over the mean of all layers."""

    keeps_constraints: ClassVar[bool] = True
    quantizer: ClassVar[str | None] = "hqq"
    name: ClassVar[str]
    metric: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """The Frobenius error table and the activity of the layers."""
        return frozenset({"frobenius", "layer_activity"})

    def allocate(self, measurements: Measurements, budget_bytes: int) -> Allocation:
        """Solve the program for the weighted norms. Raises InfeasibleBudget, InputError."""

        def costs_of(choices: Choices) -> np.ndarray:
            weights = self._weights(measurements)
            layers = [module.id.layer for module in choices.modules]
            if max(layers) >= len(weights):
                raise InputError(
                    f"layer_scores hold {len(weights)} layers, but there are modules of layer {max(layers)}; "
                    "measure it on the model to allocate"
                )
            return table_costs(measurements, "frobenius", choices) * weights[layers][:, None]

        return solve_program(measurements, budget_bytes, costs_of)

    def _weights(self, measurements: Measurements) -> np.ndarray:
        """Importance over its mean, [layers]. Cosines carry rounding, so that an influence of 0 can be just below."""
        if measurements.layer_scores is None:
            raise not_measured("layer_activity")
        scores = np.maximum(np.array(measurements.layer_scores[self.metric], dtype=np.float64), 0)
        if not np.isfinite(scores).all() or not scores.any():
            raise InputError(
                f"the {self.metric} of the layers ({scores.tolist()}) weighs nothing: give finite numbers, not all 0"
            )
        return scores / scores.mean()


@dataclass(frozen=True, kw_only=True)
class AvssWeighted(_ImportanceWeighted):
    """Weighted by AVSS: the paper's variance, over the share of activations below 1 % of their root mean square.

    The published ε of 1e-5 hardly ever finds an activation of a residual stream (`lmq.layers.importance.avss`).
    """

    name: ClassVar[str] = "avss-weighted"
    summary: ClassVar[str] = "ours: mxq with weight errors multiplied by the layer's activation variance over sparsity"
    source: ClassVar[str] = "metric of Song et al. 2024, AVSS (arXiv 2411.02117); program of MXQ"
    metric: ClassVar[str] = "avss_relative"


@dataclass(frozen=True, kw_only=True)
class BiWeighted(_ImportanceWeighted):
    """Weighted by Block Influence: how far a layer turns the states that pass it."""

    name: ClassVar[str] = "bi-weighted"
    summary: ClassVar[str] = "ours: mxq with weight errors multiplied by the layer's Block Influence"
    source: ClassVar[str] = "metric of Men et al. 2024, ShortGPT (arXiv 2403.03853); program of MXQ"
    metric: ClassVar[str] = "block_influence"
