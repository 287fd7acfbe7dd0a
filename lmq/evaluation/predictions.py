"""What an encoder says of images: accuracies, and divergence from the full-precision model, image by image."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lmq.errors import NotFiniteError
from lmq.evaluation.linear_probe import probe_predictions
from lmq.evaluation.perplexity import Estimate, mean_estimate
from lmq.evaluation.similarities import Prompts, class_embeddings, similarities
from lmq.evaluation.task_scores import TaskScore
from lmq.model.losses import LOSSES, Classification
from lmq.model.streaming import StreamedModel
from lmq.tables import TableSchema

PREDICTIONS_SCHEMA = TableSchema(
    "predictions",
    3,
    pa.schema(
        [
            pa.field("image", pa.int64(), nullable=False),
            pa.field("outputs", pa.int64(), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("nll", pa.float64()),
            pa.field("rank", pa.int64()),
            pa.field("kl", pa.float64()),
            pa.field("agrees", pa.bool_()),
            pa.field("cosine", pa.float64()),
            pa.field("probed", pa.bool_()),
        ]
    ),
)
"""Per image: how many outputs the model has; of its label the loss in nats and how many classes are thought likelier;
divergence from full precision in nats, and whether its likeliest class is the same; the cosine of its embedding to that
of full precision; whether a linear probe finds its label. Null where there is none: labels of images without, classes
of an encoder without a head or texts, embeddings of a classifier."""

TOP_1, TOP_5, RECALL = "top-1", "top-5", "mean per-class recall"
COSINE = "cosine to full precision"
PROBE = "linear probe"
_TOP = 5


@torch.no_grad()
def score_images(
    model: StreamedModel,
    labels: Tensor | None,
    states: Tensor,
    reference: Tensor | None,
    *,
    reference_model: StreamedModel | None = None,
    prompts: Prompts | None = None,
    text_states: tuple[Tensor, Tensor | None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the predictions table from the last block's states [images, patches, hidden].

    `labels` [images] or None; `reference` are the full-precision model's states of the same shape, or None;
    `reference_model` is that model. With `prompts` an image is of the class whose texts it is nearest to; `text_states`
    are those of the model and of full precision that leave the last block of its tower of texts. Raises NotFiniteError
    naming an image whose outputs are not finite.
    """
    full = reference_model or model
    loss = model.loss
    of_classes = of_full = None
    if prompts is not None and text_states is not None:
        loss = LOSSES[Classification.name]
        of_classes = class_embeddings(model, prompts, text_states[0])
        of_full = None if text_states[1] is None else class_embeddings(full, prompts, text_states[1])
    rows: list[dict[str, Any]] = []
    for piece in model.split(model.loss.predicting(states)):
        first = len(rows)
        chosen = slice(first, first + len(piece))
        outputs = model.head_logits(piece)
        predicted = loss.predictions(outputs if of_classes is None else similarities(model, outputs, of_classes))
        if not bool(predicted.isfinite().all()):
            broken = first + int((~predicted.isfinite().all(1)).nonzero()[0])
            raise NotFiniteError(f"the outputs for image {broken} are not finite; give the model more bits")
        found: dict[str, list[Any]] = {"outputs": [predicted.shape[1]] * len(piece)}
        if reference is not None:
            true = full.head_logits(reference[chosen])
            expected = loss.predictions(true if of_full is None else similarities(full, true, of_full))
            found["kl"] = loss.divergence(expected, predicted).tolist()
            if not model.loss.has_classes:
                found["cosine"] = (outputs.double() * true.double()).sum(1).tolist()
            if loss.has_classes:
                found["agrees"] = (expected.argmax(1) == predicted.argmax(1)).tolist()
        if labels is not None and loss.has_classes:
            of_label = predicted.gather(1, labels[chosen].to(predicted.device)[:, None])
            found["label"] = labels[chosen].tolist()
            found["nll"] = (-of_label[:, 0].double()).tolist()
            found["rank"] = (predicted > of_label).sum(1).tolist()
        names = PREDICTIONS_SCHEMA.columns.names[1:]
        nothing: list[Any] = [None] * len(piece)
        columns = [found.get(name, nothing) for name in names]
        rows += [
            {"image": first + index, **dict(zip(names, row, strict=True))}
            for index, row in enumerate(zip(*columns, strict=True))
        ]
    return rows


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What the predictions table says of a model; None where it was not measured.

    `perplexity` is exp of the mean loss of the labels. `scores` are accuracies, shares in 0..1.
    """

    protocol: str
    perplexity: Estimate | None
    kl_divergence: Estimate | None
    kl_p99: float | None
    top1_agreement: float | None
    scores: tuple[TaskScore, ...]


def summarize_predictions(rows: Sequence[Mapping[str, Any]]) -> PredictionSummary:
    """Loss, divergence and accuracies from rows of the predictions table.

    Top-5 is left out of models with no more than five classes. The mean per-class recall counts every class alike, the
    ImageNet protocol of CLIP's authors for sets of unequal classes; its standard error is that of independent classes.
    """
    kl = [row["kl"] for row in rows if row["kl"] is not None]
    agrees = [row["agrees"] for row in rows if row["agrees"] is not None]
    labelled = [row for row in rows if row["rank"] is not None]
    outputs = rows[0]["outputs"]
    what = f"of {outputs} classes" if labelled else "without labels or classes"
    return PredictionSummary(
        protocol=f"{len(rows):,} images {what}",
        perplexity=_perplexity([row["nll"] for row in labelled]) if labelled else None,
        kl_divergence=mean_estimate(kl) if kl else None,
        kl_p99=float(np.quantile(kl, 0.99)) if kl else None,
        top1_agreement=sum(agrees) / len(agrees) if agrees else None,
        scores=tuple((_accuracies(labelled, outputs) if labelled else []) + _probe(rows) + _cosine(rows)),
    )


def _perplexity(nll: Sequence[float]) -> Estimate:
    mean = mean_estimate(nll)
    value = math.exp(mean.value)
    return Estimate(value, None if mean.stderr is None else value * mean.stderr)


def _accuracies(rows: Sequence[Mapping[str, Any]], outputs: int) -> list[TaskScore]:
    scores = [_score(TOP_1, mean_estimate([float(row["rank"] < 1) for row in rows]), len(rows))]
    if outputs > _TOP:
        scores.append(_score(TOP_5, mean_estimate([float(row["rank"] < _TOP) for row in rows]), len(rows)))
    by_class: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_class[row["label"]].append(float(row["rank"] < 1))
    recalls = {label: sum(right) / len(right) for label, right in by_class.items()}
    variance = sum(recall * (1 - recall) / len(by_class[label]) for label, recall in recalls.items())
    recall = Estimate(sum(recalls.values()) / len(recalls), math.sqrt(variance) / len(recalls))
    return [*scores, _score(RECALL, recall, len(rows))]


def with_probe(
    rows: Sequence[dict[str, Any]], model: StreamedModel, states: Tensor, labels: Tensor, fitted: Tensor, given: Tensor
) -> list[dict[str, Any]]:
    """The rows of `score_images` with what a linear probe makes of the embeddings of its images.

    `states` leave the last block for these, whose `labels` [images] are known, and `fitted` for the images that it is
    fitted to, whose labels are `given`.
    """
    judged, known = (
        torch.cat([model.head_logits(piece).cpu() for piece in model.split(each)]) for each in (states, fitted)
    )
    right = probe_predictions(known.detach(), given, judged.detach()) == labels
    return [row | {"probed": found} for row, found in zip(rows, right.tolist(), strict=True)]


def _probe(rows: Sequence[Mapping[str, Any]]) -> list[TaskScore]:
    """Accuracy of the linear probe, where there is one."""
    right = [float(row["probed"]) for row in rows if row["probed"] is not None]
    return [_score(PROBE, mean_estimate(right), len(right))] if right else []


def _cosine(rows: Sequence[Mapping[str, Any]]) -> list[TaskScore]:
    """How near embeddings are to those of full precision, where there are any."""
    cosines = [row["cosine"] for row in rows if row["cosine"] is not None]
    if not cosines:
        return []
    mean = mean_estimate(cosines)
    return [TaskScore(task=COSINE, metric="cosine", value=mean.value, stderr=mean.stderr, samples=len(cosines))]


def _score(name: str, estimate: Estimate, images: int) -> TaskScore:
    return TaskScore(task=name, metric="acc", value=estimate.value, stderr=estimate.stderr, samples=images)
