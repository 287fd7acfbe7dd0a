"""Zero-shot classification by a pair of encoders: which class's texts an image is nearest to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmq.model.streaming import StreamedModel

IMAGES, TEXTS = 0, 1
"""Numbers of the towers."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts of every class, as many for each: token ids [classes · templates, tokens], templates fastest."""

    token_ids: Tensor
    classes: int


@torch.no_grad()
def class_embeddings(model: StreamedModel, prompts: Prompts, states: Tensor) -> Tensor:
    """An embedding of length 1 for each class [classes, embedding], the mean of those of its texts.

    `states` are those that leave the last block of the tower of texts. As CLIP's authors take them: normalized before
    and after the mean.
    """
    pieces = model.split(states)
    given = prompts.token_ids.split([len(piece) for piece in pieces])
    embeddings = torch.cat([model.head_logits(piece, TEXTS, ids) for piece, ids in zip(pieces, given, strict=True)])
    return nn.functional.normalize(embeddings.view(prompts.classes, -1, embeddings.shape[-1]).mean(1), dim=-1)


def similarities(model: StreamedModel, images: Tensor, classes: Tensor) -> Tensor:
    """Logits [images, classes] of unit embeddings [images, embedding] and [classes, embedding].

    The cosine times the scale that the model learned. SigLIP's bias, the same for all, is left out: it moves no
    softmax. SigLIP itself is trained with a sigmoid for every pair; here it is judged, as CLIP, by which class is
    likeliest.
    """
    return images @ classes.to(images).t() * model.logit_scale
