"""A copy of a Llama-like model whose weights lie on no 4-bit grid, so that no configuration is flattered.

    python -m benchmarks.off_grid MODEL OUT rescale 0.25   # the same function to rounding
    python -m benchmarks.off_grid MODEL OUT noise 0.3      # another model

MODEL is a directory that transformers opens, such as SmolLM2-135M-Instruct from its Q4_1 file, converted. `rescale`
multiplies the channels between two linear operations by exp(AMOUNT · normal), divided out on the other side. `noise`
adds AMOUNT steps of normal noise, a step being that of a 4-bit grid over 32 weights. Both draw from one fixed seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_SIZE, STEPS = 32, 15


def main() -> None:
    """Write the copy in float16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("how", choices=("rescale", "noise"))
    parser.add_argument("amount", type=float)
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        (rescale if arguments.how == "rescale" else add_noise)(model, arguments.amount, normal)
    model.to(torch.float16).save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)


def rescale(model: Any, amount: float, normal: Callable[..., Tensor]) -> None:
    """Other sizes of channels: behind both norms, between values and o_proj, between up_proj and down_proj."""
    config = model.config
    groups = config.num_key_value_heads
    heads_per_group = config.num_attention_heads // groups
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = (amount * normal(config.hidden_size)).exp()
            norm.weight /= factors
            for linear in linears:
                linear.weight *= factors
        values = (amount * normal(groups * head_dim)).exp()
        _scale_outputs(attention.v_proj, values)
        by_head = values.view(groups, 1, head_dim).expand(groups, heads_per_group, head_dim)
        attention.o_proj.weight /= by_head.reshape(-1)
        inside = (amount * normal(config.intermediate_size)).exp()
        _scale_outputs(mlp.up_proj, inside)
        mlp.down_proj.weight /= inside


def _scale_outputs(linear: torch.nn.Linear, factors: Tensor) -> None:
    linear.weight *= factors[:, None]
    if linear.bias is not None:
        linear.bias *= factors


def add_noise(model: Any, amount: float, normal: Callable[..., Tensor]) -> None:
    """Noise on every linear layer but the head."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            groups = module.weight.view(-1, GROUP_SIZE)
            step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / STEPS
            module.weight.copy_((groups + amount * step * normal(*groups.shape)).view_as(module.weight))


if __name__ == "__main__":
    main()
