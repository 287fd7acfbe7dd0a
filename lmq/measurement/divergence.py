"""How far a model's predictions are from the full-precision model's, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmq.model.losses import divergence


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Per scored token: `nll` (nats), `kl` to the reference (nats), `agrees` with its most likely token."""

    nll: Tensor
    kl: Tensor | None
    agrees: Tensor | None


@torch.no_grad()
def score_tokens(logits: Tensor, targets: Tensor, reference_logits: Tensor | None) -> TokenScores:
    """Score predictions `logits` [tokens, vocabulary] of `targets` [tokens].

    KL(p_reference ‖ p) = Σ p_reference (log p_reference − log p), summed over the whole vocabulary in float32.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    nll = -log_probabilities.gather(1, targets.to(logits.device).long()[:, None])[:, 0]
    if reference_logits is None:
        return TokenScores(nll.double(), None, None)
    reference = torch.log_softmax(reference_logits.float(), dim=-1)
    agrees = reference.argmax(dim=-1) == log_probabilities.argmax(dim=-1)
    return TokenScores(nll.double(), divergence(reference, log_probabilities), agrees)
