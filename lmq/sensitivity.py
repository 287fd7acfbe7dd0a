"""Activation sensitivity of the parts of a block, as the SensiBoost authors measure it (equation 10).

Hidden states enter the block from the unquantized model. The weights of one part are quantized, the part's
output is compared with the unquantized one, and the mean squared error is the score of every module of the
part. `attn_in` and `mlp_gate` (all projections into attention and MLP) are judged by the output of the whole
attention or MLP (of the whole block where they are no submodule of their own), `attn_out` and `mlp_down` by
their own. The authors' program leaves `attn_out` out where its
shape differs from the value projection (grouped-query attention); here it is always measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmq.errors import NotFiniteError
from lmq.streaming import BlockInputs
from lmq.structure import ModuleInfo
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

SENSITIVITY_SCHEMA = TableSchema(
    "sensitivity",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            pa.field("part", pa.string(), nullable=False),
            *SPEC_FIELDS,
            pa.field("sensitivity", pa.float64()),
        ]
    ),
)

_Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@torch.no_grad()
def part_sensitivities(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    modules: Sequence[ModuleInfo],
    quantized: Mapping[str, Tensor],
) -> dict[str, float]:
    """Mean squared output error of every part of one block, by part.

    `hidden` [sequences, sequence_length, hidden] enters the block; `quantized` maps each module kind to its
    quantized weight [out_features, in_features]. The block is left as it was. Raises NotFiniteError naming
    part and layer.
    """
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(module.part, []).append(module.id.kind)
    judged = {part: _judged_by(part, kinds) for part, kinds in parts.items()}
    squared_error = dict.fromkeys(parts, 0.0)
    elements = dict.fromkeys(parts, 0)
    for sequence in range(len(hidden)):
        calls = _record_calls(block, block_inputs, hidden[sequence : sequence + 1], set(judged.values()))
        for part, kinds in parts.items():
            path = judged[part]
            args, kwargs, expected = calls[path]
            weights = {_weight_name(kind, path): quantized[kind] for kind in kinds}
            output = torch.func.functional_call(block.get_submodule(path), weights, args, kwargs)
            squared_error[part] += (_tensor(output) - expected).double().square_().sum().item()
            elements[part] += expected.numel()
    for part in parts:
        if not math.isfinite(squared_error[part]):
            raise NotFiniteError(
                f"the output error of {part} in layer {modules[0].id.layer} is {squared_error[part]}: "
                "the states that enter the layer or its quantized weights are not finite; measure both again"
            )
    return {part: squared_error[part] / elements[part] for part in parts}


def _judged_by(part: str, kinds: Sequence[str]) -> str:
    """Path of the submodule whose output is compared: the module itself, or the sub-block it feeds ("": the block)."""
    if part in ("attn_out", "mlp_down"):
        return kinds[0]
    sub_blocks = {kind.rpartition(".")[0].partition(".")[0] for kind in kinds}
    return sub_blocks.pop() if len(sub_blocks) == 1 else ""


def _weight_name(kind: str, judged_by: str) -> str:
    """Name of the weight of module `kind` within the submodule at `judged_by`."""
    return f"{kind}.weight".removeprefix(f"{judged_by}.")


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _record_calls(block: nn.Module, block_inputs: BlockInputs, hidden: Tensor, paths: set[str]) -> dict[str, _Call]:
    """Run the block once and keep arguments and output of the submodules at `paths`."""
    calls: dict[str, _Call] = {}

    def watch(path: str) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[path] = (args, kwargs, _tensor(output))

        return block.get_submodule(path).register_forward_hook(keep, with_kwargs=True)

    handles = [watch(path) for path in paths]
    try:
        block_inputs.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return calls
