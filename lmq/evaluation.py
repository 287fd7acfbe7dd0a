"""Evaluate a model, block by block: perplexity, and divergence from the full-precision model.

The full-precision model's predictions are kept as the states that leave its last block: its logits follow
from them exactly through norm and head, which are not quantized, at a thousandth of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.divergence import TokenScores, score_tokens
from lmq.errors import InputError
from lmq.perplexity import Estimate, Window, mean_estimate, strided_perplexity
from lmq.streaming import StreamedModel
from lmq.tables import TableSchema

WINDOWS_SCHEMA = TableSchema(
    "windows",
    1,
    pa.schema(
        [
            pa.field("start", pa.int64(), nullable=False),
            pa.field("end", pa.int64(), nullable=False),
            pa.field("fresh", pa.int64(), nullable=False),
            pa.field("nll_sum", pa.float64(), nullable=False),
            pa.field("kl_sum", pa.float64()),
            pa.field("top1_agreements", pa.int64()),
        ]
    ),
)

_LOGITS_AT_ONCE = 1 << 24
"""Logits held at a time (64 MB in float32), whatever the vocabulary."""

BlockPreparation = Callable[[nn.Module, int], None]
"""Called with a freshly loaded block and its layer, before it is used: puts quantized weights in place."""


@torch.no_grad()
def last_states(model: StreamedModel, windows: Tensor, prepare: BlockPreparation | None = None) -> Tensor:
    """States that leave the last block for token windows [windows, tokens]: float32 [windows, tokens, hidden].

    One block is in memory at a time. `prepare` may replace a block's weights. Raises InputError when the
    states stop being finite, naming layer and window.
    """
    hidden = model.embed(windows)
    inputs = model.block_inputs(windows.shape[1])
    for layer in range(model.structure.layers):
        with model.block(layer) as block:
            if prepare is not None:
                prepare(block, layer)
            for index in range(len(hidden)):
                hidden[index : index + 1] = inputs[layer].run(block, hidden[index : index + 1])
        finite = hidden.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise InputError(
                f"activations leaving layer {layer} are not finite in window {int((~finite).nonzero()[0])}; "
                "the allocation or the model is unusable as it is"
            )
    return hidden


@torch.no_grad()
def score_windows(
    model: StreamedModel, windows: Sequence[Window], tokens: Tensor, states: Tensor, reference: Tensor | None
) -> list[dict[str, Any]]:
    """Rows of the windows table from the last block's states [windows, prefix + window tokens, hidden].

    `tokens` [windows, prefix + window tokens] are what the model saw (a prefix is a BOS token);
    `reference` are the full-precision model's states of the same shape, or None.
    """
    rows = []
    for index, window in enumerate(windows):
        total = tokens.shape[1]
        predicting = slice(total - 1 - window.scored, total - 1)
        scores = _score(
            model,
            states[index, predicting],
            tokens[index, total - window.scored :],
            None if reference is None else reference[index, predicting],
        )
        rows.append(
            {
                "start": window.start,
                "end": window.end,
                "fresh": window.fresh,
                "nll_sum": scores.nll.sum().item(),
                "kl_sum": None if scores.kl is None else scores.kl.sum().item(),
                "top1_agreements": None if scores.agrees is None else int(scores.agrees.sum()),
            }
        )
    return rows


def _score(model: StreamedModel, states: Tensor, targets: Tensor, reference: Tensor | None) -> TokenScores:
    step = max(1, _LOGITS_AT_ONCE // model.structure.vocabulary_size)
    pieces = []
    for start in range(0, len(states), step):
        piece = slice(start, start + step)
        reference_logits = None if reference is None else model.head_logits(reference[None, piece])[0]
        pieces.append(score_tokens(model.head_logits(states[None, piece])[0], targets[piece], reference_logits))
    return TokenScores(
        torch.cat([piece.nll for piece in pieces]),
        None if reference is None else torch.cat([piece.kl for piece in pieces if piece.kl is not None]),
        None if reference is None else torch.cat([piece.agrees for piece in pieces if piece.agrees is not None]),
    )


def window_tokens(stream: Tensor, windows: Sequence[Window], prefix: int | None) -> Tensor:
    """Tokens of equally long windows [windows, tokens], each behind the `prefix` token (BOS) if there is one."""
    tokens = torch.stack([stream[window.start : window.end] for window in windows])
    if prefix is None:
        return tokens
    return torch.cat([torch.full((len(windows), 1), prefix, dtype=tokens.dtype), tokens], dim=1)


def paired_difference(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> Estimate:
    """Mean difference of log-perplexity over the same windows, `rows` minus `baseline`, with its standard error."""
    differences = []
    for row, other in zip(rows, baseline, strict=True):
        scored = Window(row["start"], row["end"], row["fresh"]).scored
        differences.append((row["nll_sum"] - other["nll_sum"]) / scored)
    return mean_estimate(differences)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the windows table says of a model; None where it was not measured."""

    perplexity: Estimate
    kl_divergence: Estimate | None
    top1_agreement: float | None
    scored_tokens: int


def summarize(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Perplexity, mean KL (nats per token) and top-1 agreement from rows of the windows table."""
    windows = [Window(row["start"], row["end"], row["fresh"]) for row in rows]
    scored = [window.scored for window in windows]
    kl = agreement = None
    if rows[0]["kl_sum"] is not None:
        kl = mean_estimate([row["kl_sum"] / n for row, n in zip(rows, scored, strict=True)], scored)
        agreement = sum(row["top1_agreements"] for row in rows) / sum(scored)
    return Evaluation(
        perplexity=strided_perplexity(windows, [row["nll_sum"] for row in rows]),
        kl_divergence=kl,
        top1_agreement=agreement,
        scored_tokens=sum(scored),
    )
