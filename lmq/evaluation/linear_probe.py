"""A linear classifier on the embeddings of an encoder: how much of the classes they still tell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmq.errors import InputError

PENALTY = 1.0
"""Weight of half the squared coefficients beside the summed loss, as in scikit-learn's default (C = 1)."""
_STEPS = 200


def probe_predictions(embeddings: Tensor, labels: Tensor, judged: Tensor) -> Tensor:
    """Labels int64 [judged] that a multinomial logistic regression gives to `judged` [judged, embedding].

    It is fitted to `embeddings` [images, embedding] and their `labels` [images], whose features are scaled to mean 0
    and variance 1, by L-BFGS in float64; the intercept is not penalized. Raises InputError where there is one class.
    """
    classes, numbers = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError("the images that a linear probe is fitted to are of one class; ask for more (images.probe)")
    mean, deviation = embeddings.double().mean(0), embeddings.double().std(0, correction=0).clamp(min=1e-12)
    fitted, judged = ((each.double() - mean) / deviation for each in (embeddings, judged))
    weight = torch.zeros(fitted.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, intercept], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(fitted @ weight + intercept, numbers, reduction="sum")
        total = found + 0.5 * PENALTY * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        return classes[(judged @ weight + intercept).argmax(1)]
