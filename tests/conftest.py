"""Tiny random models with a tokenizer, saved as checkpoints: what every room is tested on, offline and on CPU."""

from __future__ import annotations

import gc

if gc.isenabled():  # until the tests are collected: a fifth of the imports' time goes into looking for garbage
    gc.disable()

import os
import pydoc_data.topics
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # hqq compiles at import what nothing here calls: a second in every process

import pytest
import torch
from hypothesis import settings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    import torch.utils.mkldnn  # imported by hqq through torch.compile; warns of torch's own code, once

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

settings.register_profile("lmq", deadline=None)  # a loaded machine is no failure
settings.load_profile("lmq")

TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Rows of 64 and 128 weights: groups of 128 straddle the rows of some matrices and fit those of others."""


torch.set_num_threads(1)  # as one worker of a run; tiny tensors gain nothing from more


def pytest_collection_finish() -> None:
    """From here on garbage is collected again, among what the tests make: modules are never garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors and texts that may lie beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"reference data {path} is not there")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama: multi-head attention, untied embeddings."""
    return _save(LlamaForCausalLM(LlamaConfig(**TINY_SHAPE, tie_word_embeddings=False)), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: grouped-query attention with biases, tied embeddings."""
    config = Qwen2Config(**TINY_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
    return _save(Qwen2ForCausalLM(config), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma3: norms of queries and keys, sliding and full attention, a tokenizer that puts BOS first, tied."""
    config = Gemma3TextConfig(
        **TINY_SHAPE,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    )
    return _save(Gemma3ForCausalLM(config), tmp_path_factory, adds_bos=True)


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-3: queries, keys and values fused in one matrix, gate and up fused in another."""
    config = Phi3Config(**TINY_SHAPE, num_key_value_heads=2, tie_word_embeddings=False)
    return _save(Phi3ForCausalLM(config), tmp_path_factory)


@pytest.fixture(params=["tiny_llama", "tiny_qwen", "tiny_gemma", "tiny_phi"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny models in turn."""
    return request.getfixturevalue(request.param)


def _save(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory, *, adds_bos: bool = False) -> Path:
    path = tmp_path_factory.mktemp(model.config.model_type)
    _randomise(model)
    model.save_pretrained(path)
    _tokenizer(adds_bos).save_pretrained(path)
    return path


def _randomise(model: PreTrainedModel) -> None:
    """Seeded weights of every shape, so that norms and biases matter as well."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.25 if "embed" in name or "lm_head" in name else 0.15))


def _tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 500 tokens, trained on the text every Python has; the rest is for tokens that classes add."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator((topics[key] for key in sorted(topics)[:20]), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", model_max_length=256
    )
