"""Texts for the classes of images, as pairs of encoders are asked for them: `a photo of a {}.`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.images.sources import read_images
from lmq.model.skeleton import read_model_config
from lmq.text.calibration import load_tokenizer, seeded_order

TEMPLATE = "a photo of a {}."


def class_names(source: str, column: str = "image", label_column: str = "label") -> tuple[str, ...]:
    """Names of the classes of a source of images. Raises InputError where its labels have none."""
    classes = read_images(source, column, label_column).classes
    if classes is None:
        raise InputError(
            f"the labels of {source} have no names, which texts for its classes are made of; name them in "
            f"{label_column!r} (images.label_column), or pass a folder with a folder for each class"
        )
    return classes


def check_template(template: str) -> None:
    """Raise InputError for a template without exactly one {} for the name of a class."""
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise InputError(f"the template {template!r} has not one {{}} for the name of a class, as in {TEMPLATE!r}")


def prompt_tokens(
    classes: Sequence[str], templates: Sequence[str], model_dir: Path, *, count: int | None = None, seed: int = 42
) -> Tensor:
    """Token ids int32 [classes · templates, tokens] of all texts, templates fastest, filled up to what the model sees.

    `count` of them drawn by `seed` (None: all, in order). Raises InputError without a tokenizer, and for one that has
    nothing to fill up with.
    """
    texts = [template.replace("{}", name) for name in classes for template in templates]
    if count is not None and count < len(texts):
        texts = [texts[number] for number in sorted(seeded_order(len(texts), seed)[:count])]
    length = read_model_config(model_dir).text_config.max_position_embeddings
    try:
        found: Any = load_tokenizer(model_dir)(texts, padding="max_length", truncation=True, max_length=length)
    except ValueError as error:
        raise InputError(f"the tokenizer of {model_dir} cannot fill texts up to {length} tokens: {error}") from error
    return torch.tensor(found["input_ids"], dtype=torch.int32)
