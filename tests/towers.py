"""Tiny random encoders of images with their processors, saved as model directories."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
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


def make_encoder(path: Path, name: str) -> Path:
    """Write the encoder and a processor for images of its size."""
    torch.manual_seed(0)
    model = _ENCODERS[name]().eval()
    for parameter in model.parameters():  # classifiers and norms begin as zeros and ones
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path, save_original_format=name != "dinov2-base")  # its gate and up are stored as one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(path)
    return path
