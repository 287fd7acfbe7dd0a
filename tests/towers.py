"""Tiny random encoders of images with their processors, saved as model directories."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

IMAGE, PATCH, CLASSES = 8, 4, 10
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_labels": CLASSES,
    "initializer_range": 0.15,
}

_ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(intermediate_size=128, **_SHAPE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **_SHAPE)),
    "dinov2-base": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **_SHAPE)),
}
ENCODERS = tuple(_ENCODERS)

VOCABULARY, TEXT = 512, 16
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

_PAIRS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=_VISION, text_config=_TEXT, projection_dim=48)),
    "siglip": lambda: SiglipModel(
        SiglipConfig(vision_config=_VISION, text_config=_TEXT | {"projection_size": _VISION["hidden_size"]})
    ),
}
PAIRS = tuple(_PAIRS)
"""Pairs of a tower of images and one of texts, of different widths."""


def make_encoder(path: Path, name: str) -> Path:
    """Write the encoder and a processor for images of its size."""
    torch.manual_seed(0)
    model = (_ENCODERS | _PAIRS)[name]().eval()
    for parameter in model.parameters():  # classifiers and norms begin as zeros and ones
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path, save_original_format=name != "dinov2-base")  # its gate and up are stored as one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(path)
    if name in PAIRS:
        _tokenizer().save_pretrained(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    """Words of the tests' prompts, between a token that begins and one that ends a text."""
    words = ["<begin>", "<end>", "a", "photo", "of", "digit", ".", *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>", pad_token="<end>", unk_token="<end>"
    )
