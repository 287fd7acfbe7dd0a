"""How far a model's predictions are from the full-precision model's, token by token.

The divergence of a model in which one module alone is quantized is that module's exact cost, also where errors are
not small. It takes one pass through the model's later blocks per (module, configuration). So it is measured for a few
configurations, and the curve of a cheaper cost carries it to the others (`carried_costs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

MODULE_DIVERGENCE_SCHEMA = TableSchema(
    "module-divergence",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("divergence", pa.float64(), nullable=False),
            pa.field("divergence_stderr", pa.float64()),
        ]
    ),
)
"""`divergence`: mean KL per token in nats; its standard error is over sequences, null for a single one."""

TYPICAL_GROUP_SIZE = 64
MOST_BITS = 4
"""Up to these many bits a configuration per bit width is measured; what 8 bits cost is near 0."""


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


def divergence(reference: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(p_reference ‖ p) of every token in nats, float64 [tokens], from log-probabilities [tokens, vocabulary]."""
    return (reference.exp() * (reference - log_probabilities)).sum(dim=-1).double()


def default_specs(menu: tuple[QuantSpec, ...]) -> tuple[QuantSpec, ...]:
    """One configuration per bit width up to 4, of the group size nearest to 64; of an 8-bit menu, the smallest."""
    nearest: dict[int, QuantSpec] = {}
    for spec in sorted(menu, key=lambda spec: (abs(np.log2(spec.group_size / TYPICAL_GROUP_SIZE)), spec)):
        nearest.setdefault(spec.bits, spec)
    few_bits = tuple(spec for bits, spec in sorted(nearest.items()) if bits <= MOST_BITS)
    return few_bits or (min(menu, key=lambda spec: spec.bits_per_weight),)


def standard_error(divergences: Tensor) -> float | None:
    """Standard error of the mean over sequences [sequences]; None for a single one."""
    return float(divergences.std() / len(divergences) ** 0.5) if len(divergences) > 1 else None


def carried_costs(
    measured: np.ndarray, measured_specs: tuple[QuantSpec, ...], cheap: np.ndarray, specs: tuple[QuantSpec, ...]
) -> np.ndarray:
    """Costs [modules, specs]: as measured, or carried from the measured configuration of nearest size.

    `measured` [modules, measured_specs] and `cheap` [modules, specs and measured_specs, in this order]. What was
    not measured is the measured cost times the ratio of the cheap costs, or the measured cost where that has none.
    """
    costs = np.empty((len(measured), len(specs)))
    for column, spec in enumerate(specs):
        distances = [abs(np.log(spec.bits_per_weight / other.bits_per_weight)) for other in measured_specs]
        anchor = int(np.argmin(distances))
        anchor_cheap = cheap[:, len(specs) + anchor]
        ratio = np.divide(cheap[:, column], anchor_cheap, out=np.ones(len(measured)), where=anchor_cheap > 0)
        costs[:, column] = measured[:, anchor] * (1.0 if spec == measured_specs[anchor] else ratio)
    return costs
