"""Super weights: single weights of a `down_proj` that make a huge activation in one channel.

Source: Yu et al. 2024 (arXiv 2411.07191), section 3. A layer that holds one shows a spike in the input of its
`down_proj`, at the weight's column, and one in its output, at the weight's row; later layers carry the output on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmq.errors import InputError
from lmq.measurement.base import LayerReplay, Measurement, Need, Row
from lmq.model.block_inputs import BlockInputs
from lmq.model.structure import ModuleId
from lmq.numerics import require_finite
from lmq.tables import MODULE_FIELDS, TableSchema

SUPER_WEIGHTS_SCHEMA = TableSchema(
    "super-weights",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *(
                pa.field(f"{side}_{column}", column_type, nullable=column == "rms_ratio")
                for side in ("input", "output")
                for column, column_type in (
                    ("spike", pa.float64()),
                    ("channel", pa.int32()),
                    ("token", pa.int64()),
                    ("rms_ratio", pa.float64()),
                )
            ),
        ]
    ),
)
"""One row per layer; the suspected super weight is `weight[output_channel, input_channel]`."""


@dataclass(frozen=True)
class Spike:
    """The activation of largest size: its size, where it is, and its ratio to the root mean square of all of them.

    `rms_ratio` is None where all activations are 0.
    """

    value: float
    channel: int
    token: int
    rms_ratio: float | None


def find_spike(states: Tensor, name: str = "the states") -> Spike:
    """The largest |x| of `states` [tokens, features], of any float dtype; the first of equals.

    Raises NotFiniteError for NaN or infinity, InputError for states that are empty or not [tokens, features].
    """
    if states.ndim != 2 or not states.numel():
        raise InputError(
            f"{name} of shape {list(states.shape)} have no spike; pass [tokens, features], neither of them 0"
        )
    require_finite(states, name)
    token_peaks, channels = states.detach().abs().max(dim=1)
    token = int(token_peaks.argmax())
    value = float(token_peaks[token])
    return Spike(value, int(channels[token]), token, value / _root_mean_square(states) if value else None)


def super_weight_row(module: ModuleId, inputs: Tensor, outputs: Tensor) -> dict[str, Any]:
    """Row of `SUPER_WEIGHTS_SCHEMA`: spikes in the `inputs` [tokens, in_features] of a `down_proj` and its `outputs`.

    `outputs` [tokens, out_features] belong to the same tokens. Raises as `find_spike` does.
    """
    row: dict[str, Any] = {"layer": module.layer, "kind": module.kind}
    for side, states in (("input", inputs), ("output", outputs)):
        spike = find_spike(states, f"the {side}s of {module}")
        row |= {
            f"{side}_spike": spike.value,
            f"{side}_channel": spike.channel,
            f"{side}_token": spike.token,
            f"{side}_rms_ratio": spike.rms_ratio,
        }
    return row


@torch.no_grad()
def capture_spikes(
    block: nn.Module, block_inputs: BlockInputs, hidden: Tensor, modules: Sequence[ModuleId]
) -> list[dict[str, Any]]:
    """Rows of `SUPER_WEIGHTS_SCHEMA` for modules of one block, replayed on the states that enter it.

    `hidden` [sequences, sequence_length, hidden]; tokens are counted through the sequences, those of an expert through
    the ones that were routed to it. The block is left as it was. Raises as `find_spike` does.
    """
    seen: dict[ModuleId, tuple[list[Tensor], list[Tensor]]] = {module: ([], []) for module in modules}

    def watch(module: ModuleId) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for kept, states in zip(seen[module], (args[0], output), strict=True):
                kept.append(states.flatten(0, -2).clone())  # the block may go on to change them in place

        return block.get_submodule(module.kind).register_forward_hook(keep)

    handles = [watch(module) for module in modules]
    try:
        for sequence in range(len(hidden)):
            block_inputs.run(block, hidden[sequence : sequence + 1])
    finally:
        for handle in handles:
            handle.remove()
    return [
        super_weight_row(module, torch.cat(inputs), torch.cat(outputs))
        for module, (inputs, outputs) in seen.items()
        if inputs  # no row for an expert that no token was routed to
    ]


def _root_mean_square(states: Tensor) -> float:
    squares = sum(token.double().square().sum().item() for token in states.detach())
    return (squares / states.numel()) ** 0.5


def measure_super_weights(layer: LayerReplay) -> list[Row]:
    """Largest input and output of every down projection of one layer."""
    down = [module.id for module in layer.modules if module.part == "mlp_down"]
    return capture_spikes(layer.block, layer.block_inputs, layer.hidden, down)


SUPER_WEIGHTS = Measurement(
    name="super_weights",
    title="Super weights",
    schema=SUPER_WEIGHTS_SCHEMA,
    needs=frozenset({Need.STATES}),
    version=2,
    measure=measure_super_weights,
)
