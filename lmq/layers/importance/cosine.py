"""What layers change in the direction of the states: angular distance, beside Block Influence a measure of it.

Both compare the states that enter a layer with those that leave it, taken at the blocks themselves: the last
entry of transformers' `hidden_states` lies behind the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.measurement.layer_activity import check_directions, cosines


@torch.no_grad()
def angular_distance(entering: Tensor, leaving: Tensor, *, layer: int) -> float:
    """Mean over sequences of arccos(cos(h_entering, h_leaving)) / π at the last token, from 0 to 1.

    Both states are [sequences, hidden] of last tokens; `leaving` may lie several layers after `layer`, which
    `entering` enters. Sequences whose last state has length 0 are treated as `cosines` says. Source: Gromov et al. 2024
    (arXiv 2403.17887). Raises NotFiniteError naming the layer.
    """
    found = cosines(entering, leaving, layer)
    check_directions(len(found), len(entering), layer)
    return float((found.clamp(-1, 1).arccos() / math.pi).mean())


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
