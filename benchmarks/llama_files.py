"""Random Llama checkpoints of any shape, written block by block, so that no more than one block is in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

_STANDARD_DEVIATION = 0.02
_TAIL = 0.5
"""Spread of the logarithm of a weight's size: a kurtosis of 3 exp(4 · 0.25), about 8."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Widths of a Llama's blocks."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int


LLAMA_2_7B = LlamaShape(name="Llama-2-7B", hidden=4096, intermediate=11008, heads=32, key_value_heads=32, layers=32)
LLAMA_3_1_70B = LlamaShape(
    name="Llama-3.1-70B", hidden=8192, intermediate=28672, heads=64, key_value_heads=8, layers=80
)
SMOLLM2_135M = LlamaShape(name="SmolLM2-135M", hidden=576, intermediate=1536, heads=9, key_value_heads=3, layers=30)


def write_llama(path: Path, shape: LlamaShape, *, blocks: int, vocabulary: int = 512) -> None:
    """Write `blocks` blocks of heavy-tailed float16 weights, one file each, with configuration and tokenizer."""
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    ).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    places = _save(path, "around", _around(shape, vocabulary, generator))
    for layer in range(blocks):
        places |= _save(path, f"block-{layer}", _block(shape, layer, generator))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def heavy_tailed(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal weights of lognormal spread, float32."""
    spread = torch.randn(size, generator=generator).mul_(_TAIL).exp_()
    return torch.randn(size, generator=generator).mul_(spread).mul_(_STANDARD_DEVIATION)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _save(path: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one file in float16; the file of every tensor."""
    file = f"{name}.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def _around(shape: LlamaShape, vocabulary: int, generator: torch.Generator) -> dict[str, Tensor]:
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {name: heavy_tailed((vocabulary, shape.hidden), generator) for name in tables}
    return tensors | {"model.norm.weight": torch.ones(shape.hidden)}


def _block(shape: LlamaShape, layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    key_value = shape.hidden // shape.heads * shape.key_value_heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (key_value, shape.hidden),
        "self_attn.v_proj": (key_value, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    prefix = f"model.layers.{layer}."
    tensors = {f"{prefix}{kind}.weight": heavy_tailed(size, generator) for kind, size in sizes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{prefix}{norm}.weight": torch.ones(shape.hidden) for norm in norms}
