"""Tiny random mixtures of experts, one of every family, and what a quantized one computes by transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def _mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**_SHAPE, **_FOUR, intermediate_size=128))


def _qwen2() -> PreTrainedModel:
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
    config = Qwen2MoeConfig(**_SHAPE, **sizes, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    return Qwen2MoeForCausalLM(config)


def _qwen3() -> PreTrainedModel:
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}
    routing = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, **sizes, **routing))


def _olmoe() -> PreTrainedModel:
    routing = {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return OlmoeForCausalLM(OlmoeConfig(**_SHAPE, **routing, intermediate_size=64))


def _gpt_oss() -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**_SHAPE, **_FOUR, intermediate_size=64, head_dim=16, sliding_window=8))


def _deepseek_v2() -> PreTrainedModel:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**_SHAPE, **_DEEPSEEK, q_lora_rank=None, topk_method="greedy"))


def _deepseek_v3() -> PreTrainedModel:
    config = DeepseekV3Config(**_SHAPE, **_DEEPSEEK, q_lora_rank=32, n_group=2, topk_group=1)
    return DeepseekV3ForCausalLM(config)


def _granite() -> PreTrainedModel:
    return GraniteMoeForCausalLM(GraniteMoeConfig(**_SHAPE, **_FOUR, intermediate_size=64))


def _granite_shared() -> PreTrainedModel:
    config = GraniteMoeSharedConfig(**_SHAPE, **_FOUR, intermediate_size=64, shared_intermediate_size=64)
    return GraniteMoeSharedForCausalLM(config)


MIXTURES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2,
    "qwen3-moe": _qwen3,
    "olmoe": _olmoe,
    "gpt-oss": _gpt_oss,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
    "granite-moe": _granite,
    "granite-moe-shared": _granite_shared,
}
"""Gate and up in one matrix or interleaved, transposed, with biases, with shared experts, dense first layers."""

EXPERTS = {"qwen3-moe": 8, "olmoe": 8}
"""Experts of a layer where they are not 4."""


def mixture(family: str) -> PreTrainedModel:
    """A model of a family with seeded weights of a size at which every expert matters."""
    generator = torch.Generator().manual_seed(7)
    model = MIXTURES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.copy_(0.15 * noise)
    return model.eval()


@torch.no_grad()
def put_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put matrices [out_features, in_features], by our paths, in the parameters that transformers' own model has."""
    state = model.state_dict()
    transposed = model.config.model_type == "gpt_oss"
    for path, weight in weights.items():
        if f"{path}.weight" in state:
            state[f"{path}.weight"].copy_(weight)
        else:
            experts, number, name = path.rsplit(".", 2)
            state[f"{experts}.{name}"][int(number)].copy_(weight.t() if transposed else weight)
