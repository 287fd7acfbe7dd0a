"""What a model takes beside its weights while it generates: its cache of keys and values, and its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmq.errors import InputError

_FLOAT32_BYTES = 4
_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
"""Types of layers that keep keys and values; the others (convolutions, linear attention) keep a state of fixed size."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of `tokens` tokens: of `layers` layers with `heads` heads of `head_dim` numbers each.

    `windowed_layers` of the layers keep the last `window` tokens only.
    """

    tokens: int
    layers: int
    windowed_layers: int
    window: int
    heads: int
    head_dim: int
    number_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of keys and values of all layers."""
        kept = (self.layers - self.windowed_layers) * self.tokens + self.windowed_layers * min(self.window, self.tokens)
        return kept * self.heads * self.head_dim * 2 * self.number_bytes

    def __str__(self) -> str:
        windowed = f" ({self.windowed_layers} of them {self.window:,} tokens)" if self.windowed_layers else ""
        return (
            f"cache of {self.tokens:,} tokens: {self.layers} layers{windowed} × {self.heads} heads × {self.head_dim} "
            f"× 2 × {self.number_bytes} bytes"
        )


def cache_of(config: Any, tokens: int, number_bytes: int) -> Cache:
    """The cache of a model by its configuration, of one sequence.

    Raises InputError for more tokens than the model sees at once, and where the configuration does not say what is kept
    per layer.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < tokens:
        raise InputError(f"the model sees {positions:,} tokens at once, not {tokens:,}; give a shorter context")
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or getattr(text, "kv_lora_rank", None):
        raise InputError(
            f"what a {text.model_type} model caches per token does not follow from its configuration; "
            "give a size instead"
        )
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    layers = text.num_hidden_layers if types is None else sum(kind in _ATTENDING for kind in types)
    windowed = sum(kind in _ATTENDING[1:] for kind in types or ()) if isinstance(window, int) else 0
    return Cache(
        tokens=tokens,
        layers=layers,
        windowed_layers=windowed,
        window=window if windowed and isinstance(window, int) else tokens,
        heads=heads,
        head_dim=_head_dim(text),
        number_bytes=number_bytes,
    )


def activation_bytes(config: Any, tokens: int, number_bytes: int) -> int:
    """The most that the states of one block take for a prompt of so many tokens at once, and the logits of the last.

    The residual stream and the input of a sub-layer, once more in float32 for the norms, the rotations of positions,
    and beside them either queries, keys and values (rotated, and repeated for every head of queries) or the states
    inside the MLP: gate and up, the activation and the product. Scores are not kept: attention is computed in tiles.
    """
    text = config.get_text_config()
    queries = text.num_attention_heads * _head_dim(text)
    keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * _head_dim(text)
    inside = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    widest = max(4 * inside, 5 * queries + 4 * keys) + 2 * _head_dim(text)
    per_token = 2 * text.hidden_size * (number_bytes + _FLOAT32_BYTES) + widest * number_bytes
    return int(tokens * per_token + text.vocab_size * (number_bytes + _FLOAT32_BYTES))


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
