"""Evaluate a model, block by block: perplexity, and divergence from the full-precision model.

The full-precision model's predictions are kept as the states that leave its last block: its logits follow
from them exactly through its norm and head, at a thousandth of the logits' size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lmq.errors import NotFiniteError
from lmq.evaluation.perplexity import (
    Estimate,
    Window,
    infinite_window,
    mean_estimate,
    protocol_name,
    strided_perplexity,
)
from lmq.measurement.divergence import TokenScores, score_tokens
from lmq.model.streaming import StreamedModel
from lmq.tables import TableSchema
from lmq.text.calibration import behind_prefix

WINDOWS_SCHEMA = TableSchema(
    "windows",
    3,
    pa.schema(
        [
            pa.field("start", pa.int64(), nullable=False),
            pa.field("end", pa.int64(), nullable=False),
            pa.field("fresh", pa.int64(), nullable=False),
            pa.field("prefix", pa.list_(pa.int32()), nullable=False),
            pa.field("nll_sum", pa.float64(), nullable=False),
            pa.field("kl_sum", pa.float64()),
            pa.field("kl", pa.list_(pa.float32())),
            pa.field("top1_agreements", pa.int64()),
        ]
    ),
)
"""Per window, the tokens it begins with, sums over its scored tokens in nats, and `kl` of each of them in order."""

BlockPreparation = Callable[[nn.Module, int], None]
"""Called with a freshly loaded block and its layer, before it is used: puts quantized weights in place."""


@torch.no_grad()
def last_states(
    model: StreamedModel,
    windows: Tensor,
    prepare: BlockPreparation | None = None,
    *,
    skipped_layers: Collection[int] = (),
    tower: int = 0,
) -> Tensor:
    """States that leave the last block for token windows [windows, tokens]: float32 [windows, tokens, hidden].

    Images [images, channels, height, width] give [images, patches, hidden]; of a model of several towers those of one.
    One block is in memory at a time. `prepare` may replace a block's weights. `skipped_layers` are left out, as
    pruning leaves them out. Raises NotFiniteError when the states stop being finite, naming layer and window.
    """
    hidden = model.embed(windows, tower)
    inputs = model.block_inputs(hidden.shape[1])
    step = model.sequences_at_once(hidden.shape[1])
    for layer in (layer for layer in model.structure.layers_of(tower) if layer not in skipped_layers):
        with model.block(layer, only_run=prepare is None) as block:
            if prepare is not None:
                prepare(block, layer)
            for start in range(0, len(hidden), step):
                hidden[start : start + step] = inputs[layer].run(block, hidden[start : start + step])
        finite = hidden.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise NotFiniteError(
                f"the states that leave layer {layer} are not finite in window {int((~finite).nonzero()[0])}; "
                "the model or its quantization is unusable: give this layer more bits"
            )
    return hidden


@torch.no_grad()
def score_windows(
    model: StreamedModel,
    windows: Sequence[Window],
    tokens: Tensor,
    states: Tensor,
    reference: Tensor | None,
    *,
    reference_model: StreamedModel | None = None,
) -> list[dict[str, Any]]:
    """Rows of the windows table from the last block's states [windows, prefix + window tokens, hidden].

    `tokens` [windows, prefix + window tokens] are what the model saw;
    `reference` are the full-precision model's states of the same shape, or None; `reference_model` is that model where
    `model` has another head. Raises NotFiniteError naming a window whose logits are not finite.
    """
    full = reference_model or model
    step = model.tokens_at_once
    rows = []
    for index, window in enumerate(windows):
        last = tokens.shape[1] - 1
        pieces = []
        for start in range(last - window.scored, last, step):
            piece = slice(start, min(start + step, last))
            targets = tokens[index, piece.start + 1 : piece.stop + 1]
            reference_logits = None if reference is None else full.head_logits(reference[index, piece])
            pieces.append(score_tokens(model.head_logits(states[index, piece]), targets, reference_logits))
        rows.append(window_row(window, pieces, prefix_of(window, tokens[index])))
    return rows


def prefix_of(window: Window, seen: Tensor) -> list[int]:
    """What the model saw in front of a window's tokens, from all that it saw [prefix + window tokens]."""
    found: list[int] = seen[: len(seen) - (window.end - window.start)].tolist()
    return found


def window_row(window: Window, pieces: Sequence[TokenScores], prefix: Sequence[int]) -> dict[str, Any]:
    """Row of the windows table from the scores of a window's tokens, piece by piece.

    Raises NotFiniteError where one is not a number.
    """
    nll_sum = sum(piece.nll.sum().item() for piece in pieces)
    kl = [value for piece in pieces if piece.kl is not None for value in piece.kl.float().tolist()]
    kl_sums = [piece.kl.sum().item() for piece in pieces if piece.kl is not None]
    agreements = [int(piece.agrees.sum()) for piece in pieces if piece.agrees is not None]
    if math.isnan(nll_sum) or math.isnan(sum(kl_sums)):
        raise NotFiniteError(
            f"the logits of tokens {window.start} to {window.end} are not finite; "
            "the model or its quantization is unusable: try it in float32, or with more bits"
        )
    return {
        "start": window.start,
        "end": window.end,
        "fresh": window.fresh,
        "prefix": list(prefix),
        "nll_sum": nll_sum,
        "kl_sum": sum(kl_sums) if kl_sums else None,
        "kl": kl if kl_sums else None,
        "top1_agreements": sum(agreements) if agreements else None,
    }


def window_tokens(stream: Tensor, windows: Sequence[Window], prefix: Sequence[int]) -> Tensor:
    """Tokens of equally long windows [windows, prefix + tokens], each behind the tokens of the `prefix`."""
    return behind_prefix(torch.stack([stream[window.start : window.end] for window in windows]), prefix)


def paired_difference(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> Estimate:
    """Mean difference of log-perplexity over the same windows, `rows` minus `baseline`, with its standard error."""
    differences = []
    for row, other in zip(rows, baseline, strict=True):
        scored = Window(row["start"], row["end"], row["fresh"]).scored
        differences.append((row["nll_sum"] - other["nll_sum"]) / scored)
    return mean_estimate(differences)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the windows table says of a model; None where it was not measured.

    `protocol` names the windows and the tokens they begin with, `kl_p99` is the 99th percentile of the tokens' KL.
    Where perplexity is infinite `broken_window` is the first window that makes it so.
    """

    protocol: str
    perplexity: Estimate
    kl_divergence: Estimate | None
    kl_p99: float | None
    top1_agreement: float | None
    scored_tokens: int
    broken_window: Window | None = None


def summarize(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Perplexity, KL (nats per token; mean and 99th percentile) and top-1 agreement from rows of the windows table."""
    windows = [Window(row["start"], row["end"], row["fresh"]) for row in rows]
    scored = [window.scored for window in windows]
    kl = kl_p99 = agreement = None
    if rows[0]["kl_sum"] is not None:
        kl_p99 = float(np.quantile(np.concatenate([row["kl"] for row in rows]), 0.99))
        kl = mean_estimate([row["kl_sum"] / n for row, n in zip(rows, scored, strict=True)], scored)
        agreement = sum(row["top1_agreements"] for row in rows) / sum(scored)
    nll_sums = [row["nll_sum"] for row in rows]
    return Evaluation(
        protocol=protocol_name(windows, rows[0]["prefix"]),
        perplexity=strided_perplexity(windows, nll_sums),
        kl_divergence=kl,
        kl_p99=kl_p99,
        top1_agreement=agreement,
        scored_tokens=sum(scored),
        broken_window=infinite_window(windows, nll_sums),
    )
