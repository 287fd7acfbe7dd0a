"""What a GGUF file says of a model besides its weights: architecture, names of tensors, metadata.

The names and keys are those of the `gguf` package, which llama.cpp publishes. Where llama.cpp's own layout differs
from that of transformers, the difference is a property of the `Architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of the rotation frequencies, which llama.cpp takes for Llama 3 scaling."""

_SLIDING_ROPE_BASE = 10_000.0
_SOFT_CAPPING = ("attn_logit_softcapping", "final_logit_softcapping")
_SCALED_ROPE = ("linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp lays out and computes the models of one `model_type`.

    `interleaved_heads`: queries and keys are rotated in neighbouring pairs, where transformers rotates halves.
    `unit_norms`: norms multiply by the stored weight, where transformers multiplies by one plus the weight.
    `sliding_period`: in every so many layers the last one attends to all tokens, the others to a window; 0: all to all.
    `layers_of_27b`: the depth that llama.cpp takes for the 27B model, whose attention it scales by the width of the
    model over its heads, and not by the size of a head.
    `unread`: fields of the configuration that the GGUF reader of transformers leaves at the default of their class.
    """

    name: str
    activation: str = "silu"
    interleaved_heads: bool = False
    unit_norms: bool = False
    sliding_period: int = 0
    layers_of_27b: int = 0
    unread: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture(name="llama", interleaved_heads=True),
    "mistral": Architecture(name="llama", interleaved_heads=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3", unread=("head_dim",)),
    "phi3": Architecture(name="phi3"),
    "gemma2": Architecture(
        name="gemma2",
        activation="gelu_pytorch_tanh",
        unit_norms=True,
        sliding_period=2,
        layers_of_27b=46,
        unread=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": Architecture(
        name="gemma3",
        activation="gelu_pytorch_tanh",
        unit_norms=True,
        sliding_period=6,
        layers_of_27b=62,
        unread=("query_pre_attn_scalar",),
    ),
}
"""By transformers' `model_type`."""


def config_problems(config: PreTrainedConfig) -> Iterator[str]:
    """What of a model's configuration llama.cpp's architectures cannot express."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        yield f"the model type {config.model_type} is not one that is exported ({', '.join(sorted(ARCHITECTURES))})"
        return
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != architecture.activation:
        yield f"the activation is {activation}; llama.cpp computes {architecture.name} with {architecture.activation}"
    yield from _rope_problems(config)
    if architecture.sliding_period:
        yield from _sliding_problems(config, architecture)
        yield from _gemma_problems(config, architecture)


def _rope_problems(config: PreTrainedConfig) -> Iterator[str]:
    rope = _rope(config)
    if rope["rope_type"] not in ("default", *_SCALED_ROPE):
        yield f"rotary embeddings of type {rope['rope_type']} are not exported (default, linear and llama3 are)"
    if rope.get("partial_rotary_factor", 1) != 1:
        yield f"only {rope['partial_rotary_factor']:.0%} of each head is rotated; whole heads are exported"


def _sliding_problems(config: PreTrainedConfig, architecture: Architecture) -> Iterator[str]:
    period = architecture.sliding_period
    pattern = ["sliding_attention"] * (period - 1) + ["full_attention"]
    layers = config.num_hidden_layers
    if list(config.layer_types) != (pattern * layers)[:layers]:
        yield f"layers do not slide in llama.cpp's pattern, every {period}th with full attention"
    sliding = config.rope_parameters.get("sliding_attention")
    if sliding is not None and (sliding["rope_type"], sliding["rope_theta"]) != ("default", _SLIDING_ROPE_BASE):
        yield (
            f"sliding layers rotate with base {sliding['rope_theta']:g} ({sliding['rope_type']}); "
            f"llama.cpp takes {_SLIDING_ROPE_BASE:g} (default)"
        )


def _gemma_problems(config: PreTrainedConfig, architecture: Architecture) -> Iterator[str]:
    for name in _SOFT_CAPPING:
        is_computed, value = architecture.name == "gemma2", getattr(config, name)
        if is_computed != (value is not None):
            yield f"{name} is {value}; llama.cpp computes {architecture.name} {'with' if is_computed else 'without'} it"
    is_27b = config.num_hidden_layers == architecture.layers_of_27b
    expected = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != expected:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp takes {expected}"


def config_notes(config: PreTrainedConfig) -> Iterator[str]:
    """What a reader of the file should know of a model that has no `config_problems`."""
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and not ARCHITECTURES[config.model_type].sliding_period:
        yield (
            f"attention slides over {window} tokens, where llama.cpp attends to all: the same up to {window} tokens, "
            "not beyond"
        )
    if unread := unread_settings(config):
        yield (
            f"the GGUF reader of transformers takes no {', '.join(unread)} from a file; "
            "the check gave it those of the checkpoint. llama.cpp is not concerned"
        )


def unread_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields, with their values, in which the configuration that transformers reads from the file will differ."""
    defaults = type(config)()
    names = [
        name for name in ARCHITECTURES[config.model_type].unread if getattr(config, name) != getattr(defaults, name)
    ]
    if _rope(config)["rope_type"] in _SCALED_ROPE:
        names.append("rope_parameters")
    return {name: getattr(config, name) for name in names}


def add_metadata(writer: gguf.GGUFWriter, config: PreTrainedConfig, vocabulary_size: int) -> None:
    """Write the sizes, the rotary embeddings and the attention of a model that has no `config_problems`."""
    architecture = ARCHITECTURES[config.model_type]
    head_size, rope = _head_size(config), _rope(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture.sliding_period:
        writer.add_sliding_window(config.sliding_window)
    if architecture.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rope_factors(config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """The tensor `ROPE_FACTORS`, float32 [head size / 2], of a model with Llama 3 scaling."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, _head_size(config), 2).to(torch.float32) / _head_size(config)
    return (1 / rope["rope_theta"] ** exponents / scaled).numpy()


def gguf_name(config: PreTrainedConfig, name: str) -> str | None:
    """GGUF's name of a tensor of transformers; None if the architecture has no place for it."""
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[config.model_type].name)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    suffixes = (".weight", ".bias")
    # checkpoints of base models leave out the first part of the name
    return names.get_name(name, suffixes) or names.get_name(f"model.{name}", suffixes)


def head_rows(config: PreTrainedConfig, name: str) -> NDArray[np.int64] | None:
    """The order in which llama.cpp takes the rows of GGUF tensor `name`; None where it is that of transformers."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or not ARCHITECTURES[config.model_type].interleaved_heads:
        return None
    rows = np.arange(heads * _head_size(config))
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def norm_offset(config: PreTrainedConfig, name: str) -> float:
    """What llama.cpp's weight of GGUF tensor `name` has more than that of transformers."""
    return 1.0 if ARCHITECTURES[config.model_type].unit_norms and name.endswith("norm.weight") else 0.0


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters; of the full-attention layers where layers differ."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)
