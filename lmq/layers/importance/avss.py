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

from lmq.errors import InputError


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
