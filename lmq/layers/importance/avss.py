"""Activation variance–sparsity score (AVSS) of layers, Song et al. 2024 (arXiv 2411.02117).

The score of a layer is AV / AS: the variance of the activations that leave the block over their sparsity, the
share of them that is nearly 0; over the layers the scores are normalised to sum 1. The paper takes the variance
over all activations. Its authors' program takes another: the mean over the tokens of a sequence, its variance
over the hidden dimension, and the mean of that over the sequences. Both are here.

In a residual stream the sparsity at the published ε of 1e-5 is often 0. Such a layer is given the sparsity of
half an activation, 1 / (2·elements): the finest that the measurement resolves, so that the score stays finite
and variance alone ranks these layers. An ε relative to the activations' root mean square needs no such guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.numerics import require_finite

ABSOLUTE_EPSILON = 1e-5
RELATIVE_EPSILON = 1e-2


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics:
    """What AVSS takes from the states that leave one layer.

    `variance` is the paper's, over all `elements` activations. `pooled_variance` is the authors' program's.
    `sparsity` is the share of |a| below an absolute ε, `relative_sparsity` below ε times the root mean square.
    """

    variance: float
    pooled_variance: float
    sparsity: float
    relative_sparsity: float
    elements: int


@torch.no_grad()
def activation_statistics(
    leaving: Tensor,
    *,
    layer: int,
    absolute_epsilon: float = ABSOLUTE_EPSILON,
    relative_epsilon: float = RELATIVE_EPSILON,
) -> ActivationStatistics:
    """Statistics of the states [sequences, sequence_length, hidden] that leave a layer; sums are float64.

    `variance` divides by the number of elements, `pooled_variance` by hidden − 1, as the authors' program does.
    That program also counts padding; the sequences here have none. Raises NotFiniteError naming the layer.
    """
    require_finite(leaving, f"the states that leave layer {layer}")
    elements = leaving.numel()
    mean = math.fsum(sequence.double().sum().item() for sequence in leaving) / elements
    mean_square = math.fsum(sequence.double().square().sum().item() for sequence in leaving) / elements
    threshold = relative_epsilon * math.sqrt(mean_square)
    pooled = [sequence.double().mean(dim=0).var(correction=1).item() for sequence in leaving]
    return ActivationStatistics(
        variance=math.fsum((sequence.double() - mean).square().sum().item() for sequence in leaving) / elements,
        pooled_variance=math.fsum(pooled) / len(pooled),
        sparsity=sum(_count_below(sequence, absolute_epsilon) for sequence in leaving) / elements,
        relative_sparsity=sum(_count_below(sequence, threshold) for sequence in leaving) / elements,
        elements=elements,
    )


def avss_scores(variances: Sequence[float], sparsities: Sequence[float], *, elements: int) -> list[float]:
    """Score of every layer, variance over sparsity, normalised to sum 1.

    `elements` is the number of activations each sparsity is a share of; a sparsity of 0 counts as 1 / (2·elements).
    Raises InputError when no layer's activations vary, which leaves nothing to rank.
    """
    smallest = 1 / (2 * elements)
    scores = [variance / max(sparsity, smallest) for variance, sparsity in zip(variances, sparsities, strict=True)]
    total = math.fsum(scores)
    if not total > 0:
        raise InputError(
            f"the activations of all {len(scores)} layers have variance 0, which ranks nothing; "
            "is this a trained model, and was it run on text?"
        )
    return [score / total for score in scores]


def _count_below(activations: Tensor, threshold: float) -> int:
    return int((activations.double().abs() < threshold).sum())
