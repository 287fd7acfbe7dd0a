"""Loss-aware cost of quantizing one module: the token-wise Fisher sum.

With y the module's output, y_c its output under configuration c on the same input and g = ∂L/∂y on the
summed calibration loss, the cost is S(m, c) = Σ_tokens (g · (y_c − y))²: the second-order term of the loss
with the empirical Fisher in place of the Hessian, tokens taken as independent. The token-wise sum is kept
exact: replacing it by the product of averaged activation and gradient statistics fails where a few tokens
(the attention sink) carry huge activations and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmq.model.streaming import BlockInputs
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

FISHER_SCHEMA = TableSchema(
    "fisher",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("fisher", pa.float64()),
        ]
    ),
)

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class ModuleTrace:
    """What went through one module: `inputs` [tokens, in_features], `gradients` [draws · tokens, out_features].

    Of the loss of a text there is one draw; tokens are fastest.
    """

    inputs: Tensor
    gradients: Tensor


def trace_modules(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    gradient: Tensor,
    kinds: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, ModuleTrace]:
    """Replay one block forward and backward and keep every module's inputs and output gradients.

    `hidden` [sequences, sequence_length, hidden] enters the block, `gradient` [draws · sequences, sequence_length,
    hidden] is ∂L/∂output of the block. Each sequence runs forward once for all draws. Traces are kept in `dtype` on
    the block's device; modules that share an input share its tensor. The block is left as it was.
    """
    draws = range(0, len(gradient), len(hidden))
    inputs: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    gradients: dict[str, list[list[Tensor]]] = {kind: [[] for _ in draws] for kind in kinds}
    converted: dict[Tensor, Tensor] = {}

    def by_token(states: Tensor) -> Tensor:
        return states.detach().flatten(0, -2).to(dtype)

    def watch(kind: str) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args[0] not in converted:
                converted[args[0]] = by_token(args[0])
            inputs[kind].append(converted[args[0]])
            output.register_hook(lambda output_gradient: found.__setitem__(kind, by_token(output_gradient)))

        return block.get_submodule(kind).register_forward_hook(keep)

    found: dict[str, Tensor] = {}
    handles = [watch(kind) for kind in kinds]
    try:
        for sequence in range(len(hidden)):
            entering = hidden[sequence : sequence + 1].detach().requires_grad_(True)
            with torch.enable_grad():
                leaving = block_inputs.run(block, entering)
            for number, draw in enumerate(draws):
                piece = gradient[draw + sequence][None].to(leaving)
                torch.autograd.grad(leaving, entering, piece, retain_graph=draw != draws[-1])
                for kind in kinds:
                    gradients[kind][number].append(found.pop(kind))
            converted.clear()
    finally:
        for handle in handles:
            handle.remove()
    joined = {pieces[0]: torch.cat(pieces) for pieces in inputs.values()}
    by_draw = {kind: torch.cat([piece for draw in gradients[kind] for piece in draw]) for kind in kinds}
    return {kind: ModuleTrace(joined[inputs[kind][0]], by_draw[kind]) for kind in kinds}


def token_fisher(trace: ModuleTrace, error: Tensor) -> float:
    """Σ_tokens (g · (E x))² for the weight error E = Ŵ − W [out_features, in_features].

    The products are taken in the trace's dtype, the sums over outputs in float32 and over tokens in float64.
    """
    transposed = error.to(trace.inputs.dtype).t()
    total = 0.0
    for start in range(0, len(trace.inputs), _TOKENS_AT_ONCE):
        piece = slice(start, start + _TOKENS_AT_ONCE)
        change = (trace.inputs[piece] @ transposed).float()
        loss_change = change.mul_(trace.gradients[piece]).sum(dim=1)
        total += loss_change.double().square_().sum().item()
    return total


def fast_products(device: torch.device, dtype: torch.dtype | None = None) -> torch.autocast:
    """Context in which matrix products are taken in `dtype`; unless given, in `fast_matmul_dtype`."""
    dtype = dtype or fast_matmul_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (several times faster), else float32.

    The cost is a sum over thousands of tokens; bfloat16 changes it by about 0.1 %.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch cannot tell
    return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32
