"""Strided perplexity with a whole model, the way the transformers documentation computes it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

IGNORED_LABEL = -100


@torch.no_grad()
def plain_perplexity(
    model: PreTrainedModel, token_ids: Tensor, window: int, stride: int, prefix: Sequence[int] = ()
) -> float:
    """Mean losses of the windows' new tokens, each weighted by how many tokens are new in its window.

    With a `prefix` every window follows these tokens; as without one, the text's first token is not scored, nor is the
    first of a window that has no context.
    """
    losses, previous_end = [], 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + window, len(token_ids))
        new = end - previous_end
        inputs = token_ids[begin:end].long()
        labels = inputs.clone()
        labels[: len(inputs) - new] = IGNORED_LABEL
        labels[0] = IGNORED_LABEL
        inputs = torch.cat([torch.tensor(prefix, dtype=torch.long), inputs])
        labels = torch.cat([torch.full((len(prefix),), IGNORED_LABEL), labels])
        losses.append(model(inputs[None], labels=labels[None]).loss.item() * new)
        previous_end = end
        if end == len(token_ids):
            break
    return math.exp(sum(losses) / previous_end)
