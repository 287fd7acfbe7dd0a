"""What a model is judged by: the loss that everything measured with gradients is about.

A model is one or more towers of blocks and what follows from the states that leave them. A *prediction* is one row of
that: of a causal language model one for every token but the last of a sequence, of an encoder of images one for every
image. For predictions that are distributions the divergence of a changed model is to second order half the mean square
of the gradient of its loss for labels that the model draws itself (`lmq.measurement.sequence_fisher`); that holds for
logits, and for an embedding taken as the mean of a normal distribution of unit variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmq.errors import InputError
from lmq.model.structure import NEXT_TOKEN


class Loss(Protocol):
    """Predictions of a model, and what their loss and their divergence are, in nats.

    `name` is that in the structure of a model; `auto_class` is transformers' class that opens such a model.
    """

    name: str
    auto_class: str
    per_token: bool
    """Whether every token predicts, from those before it; else a sequence as a whole does."""

    has_classes: bool
    """Whether an output is what the model thinks of a class."""

    def outputs(self, found: Any) -> Tensor:
        """The outputs that predictions are made of, from what transformers' model returns."""
        ...

    def predictions(self, outputs: Tensor) -> Tensor:
        """What `divergence` compares, float32 [predictions, outputs]."""
        ...

    def divergence(self, expected: Tensor, predicted: Tensor) -> Tensor:
        """Divergence of `predicted` from `expected` in nats, float64 [predictions]."""
        ...

    def targets(self, given: Tensor) -> Tensor:
        """What is to be predicted, of the token ids or the labels that are given. Raises InputError without labels."""
        ...

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Targets drawn from the model's own predictions, [draws, predictions, ...]."""
        ...

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss summed over the predictions."""
        ...

    def predicting(self, hidden: Tensor) -> Tensor:
        """States that single predictions are made from, of those that leave the last block: [predictions, ...]."""
        ...

    def at_states(self, gradients: Tensor, hidden: Tensor) -> Tensor:
        """Gradients [draws, *hidden.shape] from those at `predicting(hidden)` [draws, predictions, ...]."""
        ...


def divergence(reference: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(p_reference ‖ p) of every prediction in nats, float64 [predictions], from log-probabilities [predictions,
    classes]."""
    return (reference.exp() * (reference - log_probabilities)).sum(dim=-1).double()


class _Categorical:
    """Logits of classes, which a token is one of."""

    has_classes = True

    def outputs(self, found: Any) -> Tensor:
        logits: Tensor = found.logits
        return logits

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.float().log_softmax(-1)

    def divergence(self, expected: Tensor, predicted: Tensor) -> Tensor:
        return divergence(expected, predicted)

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(outputs.softmax(-1), draws, replacement=True, generator=generator).t()

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")


class _OfSequences:
    """A sequence as a whole predicts."""

    per_token = False

    def predicting(self, hidden: Tensor) -> Tensor:
        return hidden

    def at_states(self, gradients: Tensor, hidden: Tensor) -> Tensor:
        return gradients.to(hidden.device)


class NextToken(_Categorical):
    """Cross-entropy of the next token; the last token of a sequence predicts nothing."""

    name = NEXT_TOKEN
    auto_class = "AutoModelForCausalLM"
    per_token = True

    def targets(self, given: Tensor) -> Tensor:
        """Of token ids [sequences, sequence_length] all but the first of every sequence."""
        return given[:, 1:].flatten().long()

    def predicting(self, hidden: Tensor) -> Tensor:
        """States of all tokens but the last of every sequence [tokens, hidden]."""
        return hidden[:, :-1].flatten(0, 1)

    def at_states(self, gradients: Tensor, hidden: Tensor) -> Tensor:
        """Gradients that are 0 at the last token of every sequence."""
        found = torch.zeros(len(gradients), *hidden.shape, dtype=gradients.dtype, device=hidden.device)
        found[:, :, :-1] = gradients.to(hidden.device).view_as(found[:, :, :-1])
        return found


class Classification(_Categorical, _OfSequences):
    """Cross-entropy of an image's class."""

    name = "classification"
    auto_class = "AutoModelForImageClassification"

    def targets(self, given: Tensor) -> Tensor:
        """The labels [images]."""
        return given.long()


class Embedding(_OfSequences):
    """Half the squared distance of unit embeddings, which is 1 − cos of the angle between them.

    It is the divergence of two normal distributions of unit variance around them, whose "labels" are drawn there.
    """

    name = "embedding"
    auto_class = "AutoModel"
    has_classes = False

    def outputs(self, found: Any) -> Tensor:
        """The pooled state of every image, of length 1."""
        pooled = found.pooler_output if found.pooler_output is not None else found.last_hidden_state[:, 0]
        return nn.functional.normalize(pooled, dim=-1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The embeddings in float32."""
        return outputs.float()

    def divergence(self, expected: Tensor, predicted: Tensor) -> Tensor:
        """1 − cos of the angle between two embeddings."""
        return 0.5 * (expected.double() - predicted.double()).square().sum(-1)

    def targets(self, given: Tensor) -> Tensor:
        """There are none."""
        raise InputError(
            "an encoder without a head predicts no labels, so that there is no gradient of their loss; measure what "
            "needs none, such as sequence_fisher, kurtosis and sensitivity"
        )

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Embeddings with normal noise of variance 1 in every direction."""
        noise = torch.randn(draws, *outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + noise

    def summed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared distance from what was drawn."""
        return 0.5 * (outputs - targets).square().sum()


class Contrastive(Embedding):
    """The same of each of two towers, whose embeddings are compared: of images and of texts.

    What an embedding moves by is what similarities with all possible others move by. Predictions over classes, which
    need texts for these, are made in `lmq.evaluation.similarities`.
    """

    name = "contrastive"
    auto_class = "AutoModelForZeroShotImageClassification"


LOSSES: Mapping[str, Loss] = {loss.name: loss for loss in (NextToken(), Classification(), Embedding(), Contrastive())}
