"""Which of transformers' classes opens a model, and which loss it is judged by, from its configuration."""

from __future__ import annotations

from typing import Any

from lmq.model.losses import LOSSES, Classification, Contrastive, Embedding, Loss, NextToken
from lmq.model.transformers_lock import TRANSFORMERS_LOCK


def loss_of(config: Any) -> Loss:
    """The loss of a model: that of image classifiers, of encoders of images, and of pairs of encoders of images and of
    texts (CLIP, SigLIP) for those, else of the next token.

    An encoder of images is what transformers' `AutoModel` makes of a configuration that it knows a classifier for.
    """
    with TRANSFORMERS_LOCK:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            MODEL_MAPPING_NAMES,
        )

    saved_as = set(getattr(config, "architectures", None) or ())
    if saved_as & _names(MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)):
        return LOSSES[Contrastive.name]
    classifiers = _names(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type))
    if saved_as & classifiers:
        return LOSSES[Classification.name]
    if classifiers and saved_as & _names(MODEL_MAPPING_NAMES.get(config.model_type)):
        return LOSSES[Embedding.name]
    return LOSSES[NextToken.name]


def auto_class_of(config: Any) -> Any:
    """transformers' class that opens a model of this configuration whole, such as AutoModelForCausalLM.

    A vision-language model that this class does not know, or that was saved as one, is AutoModelForImageTextToText's,
    unless an encoder reads its text.
    """
    with TRANSFORMERS_LOCK:
        import transformers

        loss = loss_of(config)
        kind, vision = type(config), transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if loss.name == NextToken.name and kind in vision and not getattr(config, "is_encoder_decoder", False):
            whole: Any = vision[kind]
            saved_whole = whole.__name__ in (getattr(config, "architectures", None) or ())
            if saved_whole or kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                return transformers.AutoModelForImageTextToText
        return getattr(transformers, loss.auto_class)


def _names(found: Any) -> set[str]:
    """Class names that a mapping of transformers has for a type of model: none, one or several."""
    return set() if found is None else {found} if isinstance(found, str) else set(found)
