"""Tiny random vision-language models, one of every family, and an image with text for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMAGE_TOKEN = 500
_START, _END, _VIDEO = 501, 502, 503

_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": _VIDEO,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
}


def _qwen2() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5() -> PreTrainedModel:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _idefics3() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "llama"}
    config = transformers.Idefics3Config(
        text_config=text, vision_config=_VISION, scale_factor=2, image_token_id=IMAGE_TOKEN
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> PreTrainedModel:
    text = {**_TEXT, "model_type": "llama"}
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=_VISION, scale_factor=2, image_token_id=IMAGE_TOKEN
    )
    return transformers.SmolVLMForConditionalGeneration(config)


FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "qwen2-vl": _qwen2,
    "qwen2.5-vl": _qwen2_5,
    "llava": _llava,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
}
"""Positions in three dimensions, windows, a projector, an own place for the head, tied and untied."""

KEPT_PARTS = {
    "qwen2-vl": ("model.visual",),
    "qwen2.5-vl": ("model.visual",),
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "idefics3": ("model.vision_model", "model.connector"),
    "smolvlm": ("model.vision_model", "model.connector"),
}
"""Paths of what lies beside the language model."""


def vision_language_model(family: str) -> PreTrainedModel:
    """A model of a family with seeded weights of a size at which the image matters."""
    generator = torch.Generator().manual_seed(7)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.copy_(0.15 * noise)
    return model.float().eval()


def save_vision_language_model(family: str, path: Path) -> PreTrainedModel:
    """The model, saved in a directory as the hub has it."""
    model = vision_language_model(family)
    model.save_pretrained(path)
    return model


def image_and_text(family: str, seed: int = 0) -> dict[str, Tensor]:
    """What a family's processor makes of an image of 2 × 2 patches (Qwen: 4 × 4) with a few words behind it."""
    noise = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))
    words = torch.arange(10, 18)[None]
    image_tokens = 1 if family in ("idefics3", "smolvlm") else 4
    ids = torch.cat([torch.tensor([[0, _START, *[IMAGE_TOKEN] * image_tokens, _END]]), words], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        types = (ids == IMAGE_TOKEN).int()
        return inputs | {"pixel_values": noise, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}
    pixels = noise.flatten()[: 3 * 28 * 28].view(1, 3, 28, 28)
    if family in ("idefics3", "smolvlm"):
        return inputs | {"pixel_values": pixels[None]}
    return inputs | {"pixel_values": pixels}


def save_processor(family: str, path: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A processor for the model of a family (llava, idefics3), saved beside it.

    The tokenizer gets the tokens that stand for an image in the tiny models, as special ones.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    names = ["<image>", "<start>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor: Any = transformers.LlavaProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    elif family == "idefics3":
        edges = {"longest_edge": 28}
        images = Idefics3ImageProcessorPil(size=edges, max_image_size=edges, do_image_splitting=False)
        processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=1)
    else:
        raise ValueError(f"no processor for {family}")
    processor.save_pretrained(path)
    return processor
