"""What a layer changes in the direction of the states: Block Influence and angular distance.

Both compare the states that enter a layer with those that leave it, taken at the blocks themselves: the last
entry of transformers' `hidden_states` lies behind the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmq.errors import InputError, NotFiniteError
from lmq.numerics import require_finite


@torch.no_grad()
def block_influence(entering: Tensor, leaving: Tensor, *, layer: int) -> float:
    """1 − mean over tokens of cos(h_entering, h_leaving), from 0 (nothing turns) to 2.

    Both states are [sequences, sequence_length, hidden]; cosines are float64. Source: ShortGPT, Men et al. 2024
    (arXiv 2403.03853). Raises NotFiniteError naming the layer, also for a state of length 0, which has no direction.
    """
    sums = [_cosines(*pair, layer).sum().item() for pair in zip(entering, leaving, strict=True)]
    return 1 - math.fsum(sums) / entering[..., 0].numel()


def last_token_states(hidden: Tensor) -> Tensor:
    """States of each sequence's last token, float64 [sequences, hidden]: all that angular distances need of a layer."""
    return hidden[:, -1].double()


@torch.no_grad()
def angular_distance(entering: Tensor, leaving: Tensor, *, layer: int) -> float:
    """Mean over sequences of arccos(cos(h_entering, h_leaving)) / π at the last token, from 0 to 1.

    Both states are [sequences, hidden] of last tokens; `leaving` may lie several layers after `layer`, which
    `entering` enters. Source: Gromov et al. 2024 (arXiv 2403.17887). Raises NotFiniteError naming the layer.
    """
    return float((_cosines(entering, leaving, layer).clamp(-1, 1).arccos() / math.pi).mean())


def angular_distances(last_tokens: Sequence[Tensor], *, block_layers: int) -> list[float]:
    """Angular distance over every block of `block_layers` neighbouring layers, by the block's first layer.

    `last_tokens` has one tensor [sequences, hidden] more than there are layers: entry l enters layer l, the last one
    leaves the last layer. Raises InputError for a block that is empty or longer than the model.
    """
    layers = len(last_tokens) - 1
    if not 1 <= block_layers <= layers:
        raise InputError(f"block_layers = {block_layers} is not allowed; give 1 to {layers}, the layers of the model")
    return [
        angular_distance(last_tokens[first], last_tokens[first + block_layers], layer=first)
        for first in range(layers - block_layers + 1)
    ]


def _cosines(entering: Tensor, leaving: Tensor, layer: int) -> Tensor:
    """Cosine of every pair of states [..., hidden], float64."""
    require_finite(entering, f"the states that enter layer {layer}")
    require_finite(leaving, f"the states that leave layer {layer}")
    first, second = entering.double(), leaving.double()
    lengths = first.norm(dim=-1) * second.norm(dim=-1)
    zeros = int((lengths == 0).sum())
    if zeros:
        raise NotFiniteError(
            f"{zeros} of {lengths.numel()} states around layer {layer} have length 0 and so no cosine; "
            "do the calibration texts hold padding or a token without an embedding?"
        )
    return (first * second).sum(dim=-1) / lengths
