"""Models whose channels are far from equal."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def scale_channels_apart(model: nn.Module) -> None:
    """Scale the channels of a Llama-like model's norms by exp(0.7 · normal), in place: it computes the same."""
    generator = torch.Generator().manual_seed(5)
    for block in model.model.layers:
        for norm, takers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            factors = (0.7 * torch.randn(len(norm.weight), generator=generator)).exp()
            norm.weight.div_(factors)
            for taker in takers:
                taker.weight.mul_(factors)
