"""Loss-aware cost of quantizing one module: the sequence-wise true Fisher.

For small weight errors E = Ŵ − W the divergence of the changed model from the model itself is, to second order,

    Σ KL(p ‖ p_E) = ½ E_labels [ ⟨∇_W L, E⟩² ],

L being the summed next-token loss of a sequence for labels drawn from the model's own predictions p (the true
Fisher, which is the Gauss-Newton matrix of the divergence). The square is taken of the sum over the whole
sequence: an error acts on all tokens at once, and where tokens mix (values, and what reads them) its effects
add up. A sum of squares over single tokens misses two thirds of what values cost, and labels taken from the
text instead of p add a term that is no curvature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmq.errors import InputError
from lmq.fisher import ModuleTrace
from lmq.quant_spec import QuantSpec
from lmq.streaming import StreamedModel

_LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time (64 MB in float32), whatever the vocabulary."""


def sampled_loss_gradient(model: StreamedModel, hidden: Tensor, *, seed: int) -> Tensor:
    """Gradient of the summed loss, for labels the model draws itself, at the states that leave the last block.

    `hidden` [sequences, sequence_length, hidden]; one label is drawn per position from the model's prediction
    there, but for each last position, whose gradient is 0 (nothing follows it in the text). Same shape and
    device as `hidden`, float32. Equal seeds draw equal labels.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    states = hidden[:, :-1].flatten(0, 1)
    pieces = []
    for piece in states.split(max(1, _LOGITS_AT_ONCE // model.structure.vocabulary_size)):
        leaving = piece.detach().to(model.device, model.dtype).requires_grad_(True)
        with torch.enable_grad():
            logits = model.head_logits(leaving).float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            pieces.append(torch.autograd.grad(loss, leaving)[0].float())
    gradient[:, :-1] = torch.cat(pieces).to(gradient.device).view_as(gradient[:, :-1])
    return gradient


def sequence_fisher(
    trace: ModuleTrace, errors: Mapping[QuantSpec, Tensor], *, sequence_length: int
) -> dict[QuantSpec, float]:
    """½ Σ_sequences ⟨∇_W L, E⟩² for the weight errors E = Ŵ − W [out_features, in_features] of one module.

    In nats, summed over the sequences of the trace, whose tokens lie one after the other; its gradients are of
    `sampled_loss_gradient`. One weight gradient per sequence serves every configuration. Products are taken in
    the trace's dtype. Raises InputError where the trace is not made of whole sequences.
    """
    if len(trace.inputs) % sequence_length:
        raise InputError(
            f"a trace of {len(trace.inputs)} tokens is not made of sequences of {sequence_length}; "
            "pass the sequence length that was captured"
        )
    dtype = trace.inputs.dtype
    stacked = torch.stack([error.to(dtype).flatten() for error in errors.values()])
    totals = torch.zeros(len(stacked), dtype=torch.float64)
    pairs = zip(trace.gradients.split(sequence_length), trace.inputs.split(sequence_length), strict=True)
    for gradients, inputs in pairs:
        weight_gradient = gradients.t() @ inputs
        loss_changes = stacked @ weight_gradient.flatten()
        totals += loss_changes.cpu().double().square()
    return dict(zip(errors, (0.5 * totals).tolist(), strict=True))
