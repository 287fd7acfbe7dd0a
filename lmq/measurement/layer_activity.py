"""What the states around a layer say of it: how they vary, how many are nearly 0, how far the layer turns them.

Layer importance is made of it, beside what removing layers costs (`lmq.layers.importance`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lmq.errors import NotFiniteError
from lmq.measurement.base import LayerReplay, Measurement, Need, Row
from lmq.numerics import require_finite
from lmq.tables import TableSchema

LAYER_ACTIVITY_SCHEMA = TableSchema(
    "layer-activity",
    1,
    pa.schema(
        [
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("variance", pa.float64(), nullable=False),
            pa.field("pooled_variance", pa.float64(), nullable=False),
            pa.field("sparsity", pa.float64(), nullable=False),
            pa.field("relative_sparsity", pa.float64(), nullable=False),
            pa.field("elements", pa.int64(), nullable=False),
            pa.field("block_influence", pa.float64(), nullable=False),
        ]
    ),
)

_log = logging.getLogger(__name__)

ABSOLUTE_EPSILON = 1e-5
RELATIVE_EPSILON = 1e-2


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics:
    """What AVSS takes from the states that leave one layer.

    `variance` is the paper's, over all `elements` activations. `pooled_variance` is the authors' program's.
    `sparsity` is the share of |a| below an absolute ε, `relative_sparsity` below ε times the root mean square.
    """

    variance: float
    pooled_variance: float
    sparsity: float
    relative_sparsity: float
    elements: int


@torch.no_grad()
def activation_statistics(
    leaving: Tensor,
    *,
    layer: int,
    absolute_epsilon: float = ABSOLUTE_EPSILON,
    relative_epsilon: float = RELATIVE_EPSILON,
) -> ActivationStatistics:
    """Statistics of the states [sequences, sequence_length, hidden] that leave a layer; sums are float64.

    `variance` divides by the number of elements, `pooled_variance` by hidden − 1, as the authors' program does.
    That program also counts padding; the sequences here have none. Raises NotFiniteError naming the layer.
    """
    require_finite(leaving, f"the states that leave layer {layer}")
    elements = leaving.numel()
    mean = math.fsum(sequence.double().sum().item() for sequence in leaving) / elements
    mean_square = math.fsum(sequence.double().square().sum().item() for sequence in leaving) / elements
    threshold = relative_epsilon * math.sqrt(mean_square)
    pooled = [sequence.double().mean(dim=0).var(correction=1).item() for sequence in leaving]
    return ActivationStatistics(
        variance=math.fsum((sequence.double() - mean).square().sum().item() for sequence in leaving) / elements,
        pooled_variance=math.fsum(pooled) / len(pooled),
        sparsity=sum(_count_below(sequence, absolute_epsilon) for sequence in leaving) / elements,
        relative_sparsity=sum(_count_below(sequence, threshold) for sequence in leaving) / elements,
        elements=elements,
    )


@torch.no_grad()
def block_influence(entering: Tensor, leaving: Tensor, *, layer: int) -> float:
    """1 − mean over tokens of cos(h_entering, h_leaving), from 0 (nothing turns) to 2.

    Both states are [sequences, sequence_length, hidden]; cosines are float64, and those of `cosines` that there are.
    Source: ShortGPT, Men et al. 2024 (arXiv 2403.03853). Raises NotFiniteError naming the layer.
    """
    found = [cosines(*pair, layer) for pair in zip(entering, leaving, strict=True)]
    count = sum(len(part) for part in found)
    check_directions(count, entering[..., 0].numel(), layer)
    return 1 - math.fsum(part.sum().item() for part in found) / count


def last_token_states(hidden: Tensor) -> Tensor:
    """States of each sequence's last token, float64 [sequences, hidden]: all that angular distances need of a layer."""
    return hidden[:, -1].double()


def cosines(entering: Tensor, leaving: Tensor, layer: int) -> Tensor:
    """Cosines of the pairs of states [..., hidden] that enter and leave a layer, float64 [pairs that have one].

    A state of length 0, as a token without an embedding has, points nowhere: where a layer leaves it as it is, it turns
    nothing (cosine 1), else the pair is left out. Raises NotFiniteError naming the layer.
    """
    require_finite(entering, f"the states that enter layer {layer}")
    require_finite(leaving, f"the states that leave layer {layer}")
    first, second = entering.double().flatten(0, -2), leaving.double().flatten(0, -2)
    lengths, others = first.norm(dim=-1), second.norm(dim=-1)
    pointing = (lengths > 0) & (others > 0)
    found = (first[pointing] * second[pointing]).sum(dim=-1) / (lengths[pointing] * others[pointing])
    unchanged = int(((lengths == 0) & (others == 0)).sum())
    return torch.cat([found, found.new_ones(unchanged)])


def check_directions(found: int, states: int, layer: int) -> None:
    """Say how many of a layer's states have no cosine; raise NotFiniteError when none of them has one."""
    if found == 0:
        raise NotFiniteError(
            f"none of the {states} states around layer {layer} has a cosine: those that enter it, or those that leave "
            "it, have length 0; does the model hold weights?"
        )
    if found < states:
        _log.warning(
            "%d of %d states around layer %d have length 0 and so no cosine; they are left out of the mean. Do the "
            "calibration texts hold padding or a token without an embedding?",
            states - found, states, layer,
        )  # fmt: skip


def layer_activity(entering: Tensor, leaving: Tensor, *, layer: int) -> dict[str, Any]:
    """Row of the activity table: activation statistics and Block Influence of one layer.

    States are [sequences, sequence_length, hidden]. Raises NotFiniteError naming the layer.
    """
    statistics = asdict(activation_statistics(leaving, layer=layer))
    return {"layer": layer, **statistics, "block_influence": block_influence(entering, leaving, layer=layer)}


def measure_layer_activity(layer: LayerReplay) -> list[Row]:
    """Activation statistics and Block Influence of one layer."""
    return [layer_activity(layer.hidden, layer.leaving, layer=layer.layer)]


def last_tokens(layer: LayerReplay) -> dict[str, Tensor]:
    """States of each sequence's last token around the layer: all that angular distances need of it."""
    return {"entering": last_token_states(layer.hidden), "leaving": last_token_states(layer.leaving)}


LAYER_ACTIVITY = Measurement(
    name="layer_activity",
    title="Layer activity",
    schema=LAYER_ACTIVITY_SCHEMA,
    needs=frozenset({Need.STATES, Need.LEAVING_STATES}),
    measure=measure_layer_activity,
    tensors=last_tokens,
)


def _count_below(activations: Tensor, threshold: float) -> int:
    return int((activations.double().abs() < threshold).sum())
