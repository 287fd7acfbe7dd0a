"""Second moments that quantizers find codes with: H = mean over tokens of w_t x_t x_tᵀ of every module of a block.

Fisher-weighted, w_t is the mean over outputs of g_t², where g_t are the gradients at the module's outputs of the loss
for labels that the model draws itself, averaged over the draws. Then ½ tr(E H Eᵀ) is the token-wise Fisher cost of a
weight error E in nats per token, but for one weight per token in the place of one per token and output. Plain, w_t = 1.

Experts have those of the tokens that are routed to them, or, where these are few, what they share with the others of
their layer (`lmq.measurement.pooling`). H is a mean over all tokens of the text, whether they come by or not.

Only the unquantized model's states and gradients go in, so layers are measured apart, and one H serves every
configuration. H is symmetric: what is on and above its diagonal is accumulated and stored, by blocks of columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lmq.errors import DamagedFile
from lmq.measurement.pooling import pooled_moments
from lmq.measurement.second_moments import capture_second_moments
from lmq.measurement.traces import ModuleTrace, trace_block
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.block_inputs import BlockInputs
from lmq.numerics import fast_products, require_finite

_TOKENS_AT_ONCE = 2048
_METADATA_KEY = "lmq.moments"


def backward_with_moments(
    block: nn.Module,
    block_inputs: BlockInputs,
    hidden: Tensor,
    gradient: Tensor,
    kinds: Sequence[str],
    *,
    layer: int,
    fast_block: bool = False,
) -> tuple[Tensor, dict[str, UpperTriangle]]:
    """Loss gradient at the states that enter a block, and Fisher-weighted H of its modules, in nats per token.

    `hidden` [sequences, sequence_length, hidden] enters the block, `gradient` [draws · sequences, sequence_length,
    hidden] leaves `lmq.measurement.sequence_fisher.sampled_loss_gradient` and the backward passes that follow it, of
    which this is one: one replay gives both. The block is replayed a few sequences at a time, and no inputs are kept:
    memory is half of one H per module, and the gradient. `fast_block` runs the block itself in the faster type where
    there is one (`lmq.numerics.fast_products`). Raises NotFiniteError naming the layer.
    """
    sequences, sequence_length = hidden.shape[:2]
    device = block_inputs.device
    by_draw = gradient.unflatten(0, (-1, sequences))
    entering = gradient.new_empty(len(by_draw), *hidden.shape, dtype=torch.float32)
    found: dict[str, UpperTriangle] = {}
    seen = dict.fromkeys(kinds, 0)
    at_once = max(1, _TOKENS_AT_ONCE // sequence_length)
    for start in range(0, sequences, at_once):
        piece = slice(start, start + at_once)
        gradients = by_draw[:, piece].flatten(0, 1)
        with fast_products(device, None if fast_block else torch.float32):
            traces, at_entering = trace_block(block, block_inputs, hidden[piece], gradients, kinds, torch.float32)
        entering[:, piece] = at_entering.view(len(by_draw), -1, *hidden.shape[1:])
        for kind in kinds:
            trace = traces.pop(kind)
            if kind not in found:
                found[kind] = UpperTriangle.zeros(trace.inputs.shape[1], trace.inputs.device)
            found[kind].add_products(trace.inputs, token_weights(trace))
            seen[kind] += len(trace.inputs)
    for triangle in found.values():
        triangle.divide(sequences * sequence_length)
    require_finite(entering, f"the loss gradient at the states that enter layer {layer}")
    return entering.flatten(0, 1), pooled_moments(found, seen, _mean_triangle)


def fisher_moments_of(trace: ModuleTrace) -> UpperTriangle:
    """Fisher-weighted H of one module from what went through it."""
    triangle = UpperTriangle.zeros(trace.inputs.shape[1], trace.inputs.device)
    triangle.add_products(trace.inputs, token_weights(trace))
    triangle.divide(max(1, len(trace.inputs)))
    return triangle


def token_weights(trace: ModuleTrace) -> Tensor:
    """w_t: mean over outputs and draws of g_t², float32 [tokens]."""
    squares = trace.gradients.float().square().mean(1)
    draws = trace.draws if trace.lengths is not None else len(trace.gradients) // len(trace.inputs)
    return squares.view(draws, len(trace.inputs)).mean(0)


def input_moments(
    block: nn.Module, block_inputs: BlockInputs, hidden: Tensor, kinds: Sequence[str]
) -> dict[str, UpperTriangle]:
    """Plain H of every module; `hidden` [sequences, sequence_length, hidden] enters the block.

    Modules that share an input share H.
    """
    captured = capture_second_moments(block, block_inputs, hidden, kinds)
    triangles = {moments: UpperTriangle.of(moments.matrix) for moments in set(captured.values())}
    return {kind: triangles[captured[kind]] for kind in kinds}


def _mean_triangle(triangles: Sequence[UpperTriangle]) -> UpperTriangle:
    blocks = zip(*(triangle.blocks for triangle in triangles), strict=True)
    return UpperTriangle([torch.stack(same).mean(0) for same in blocks])


def save_moments(path: Path, moments: Mapping[str, UpperTriangle]) -> None:
    """Write the moments of a block's modules, by kind; what modules share is written once."""
    first_kind: dict[UpperTriangle, str] = {}
    tensors: dict[str, Tensor] = {}
    for kind, triangle in moments.items():
        if first_kind.setdefault(triangle, kind) == kind:
            tensors |= {f"{kind}.{number}": part.cpu().contiguous() for number, part in enumerate(triangle.blocks)}
    stored = {kind: [first_kind[triangle], len(triangle.blocks)] for kind, triangle in moments.items()}
    save_file(tensors, path, metadata={_METADATA_KEY: json.dumps(stored)})


def load_moments(path: Path) -> dict[str, UpperTriangle]:
    """Read what `save_moments` wrote. Raises DamagedFile if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            stored: dict[str, tuple[str, int]] = json.loads(file.metadata()[_METADATA_KEY])
            triangles = {
                first: UpperTriangle([file.get_tensor(f"{first}.{number}") for number in range(blocks)])
                for first, blocks in stored.values()
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{path} is not a readable file of second moments: {error}; remove it, it will be made again"
        ) from error
    return {kind: triangles[first] for kind, (first, _) in stored.items()}
