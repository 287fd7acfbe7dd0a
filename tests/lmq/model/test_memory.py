"""Estimates against what transformers keeps and allocates."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MambaConfig

from lmq.errors import InputError
from lmq.model.memory import activation_bytes, cache_of

TOKENS = 200


def kept_bytes(path: Path, dtype: torch.dtype) -> int:
    """Bytes of keys and values that transformers keeps of a sequence."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        cache = model(torch.arange(TOKENS)[None] % 500, use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_phi", "tiny_gemma"])
def test_the_cache_is_what_transformers_keeps(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    cache = cache_of(AutoConfig.from_pretrained(path), TOKENS, dtype.itemsize)
    kept = kept_bytes(path, dtype)
    if cache.windowed_layers:  # transformers keeps a window without the token that comes next
        assert (cache.windowed_layers, cache.window) == (2, 8)
        missing = cache.windowed_layers * cache.heads * cache.head_dim * 2 * dtype.itemsize
        assert kept <= cache.size_bytes <= kept + missing
    else:
        assert cache.size_bytes == kept


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at once, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in tree_leaves(made):
            if _is_tensor(tensor):
                place = tensor.untyped_storage().data_ptr()
                if place in given and place not in self.users:
                    continue  # a view of what was there before
                self.users[place] += 1
                self.sizes[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self._drop, place)
        self.most = max(self.most, sum(self.sizes.values()))
        return made

    def _drop(self, place: int) -> None:
        self.users[place] -= 1
        if self.users[place] == 0:
            del self.users[place], self.sizes[place]


def _is_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen", "tiny_phi"])
def test_activations_are_not_underestimated_nor_several_times_over(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.arange(TOKENS)[None] % 500
    with torch.no_grad(), _Peak() as peak:
        model(prompt, use_cache=False, logits_to_keep=1)
    estimate = activation_bytes(model.config, TOKENS, 4)
    assert peak.most <= estimate <= 3 * peak.most


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(InputError, match="sees 2,048 tokens at once, not 4,096"):
        cache_of(LlamaConfig(max_position_embeddings=2048), 4096, 2)
    for config in (DeepseekV3Config(), MambaConfig()):
        with pytest.raises(InputError, match=f"what a {config.model_type} model caches per token does not follow"):
            cache_of(config, 64, 2)
