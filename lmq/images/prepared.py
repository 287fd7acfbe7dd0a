"""Images as a model takes them: drawn from a source by a seed, decoded, and put through the model's own processor."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmq.errors import DamagedFile, InputError
from lmq.images.sources import ImageSet, StoredImage, read_images
from lmq.model.auto_class import loss_of
from lmq.model.skeleton import read_model_config
from lmq.model.transformers_lock import TRANSFORMERS_LOCK
from lmq.text.calibration import seeded_order

_log = logging.getLogger(__name__)

SCHEMA = "images/1"
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class ImageDraw:
    """Which images of a source are taken: `count` (None: all) of a `part`, after as many others as are `skipped`.

    The order is drawn by `seed`; "first" and "second" are its two halves. At most a share `unreadable` of the images
    that are taken may be none; these are left out.
    """

    source: str
    column: str = "image"
    label_column: str = "label"
    part: str = "all"
    seed: int = 42
    count: int | None = None
    skipped: int = 0
    unreadable: float = 0.01


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """`pixels` float32 [images, channels, height, width], and `labels` int64 [images] where the source has some."""

    pixels: Tensor
    labels: Tensor | None


def prepare_images(draw: ImageDraw, model_dir: Path) -> PreparedImages:
    """Draw images and prepare them for the model of a directory.

    Raises InputError where the source has too few images, more of them than allowed cannot be read, the model has no
    processor, or a label is none of its classes.
    """
    processor = load_processor(model_dir)
    found = read_images(draw.source, draw.column, draw.label_column)
    chosen = _chosen(found, draw)
    labels = _labels(found, model_dir, draw.source)
    decoded = {number: image for number in chosen if (image := decode(found.images[number])) is not None}
    check_readable(len(chosen) - len(decoded), len(chosen), draw.source, draw.unreadable)
    images = list(decoded.values())
    pieces = [
        processor(images=images[start : start + _AT_ONCE], return_tensors="pt")["pixel_values"]
        for start in range(0, len(images), _AT_ONCE)
    ]
    taken = None if labels is None else torch.tensor([labels[number] for number in decoded])
    return PreparedImages(torch.cat(pieces).float(), taken)


def check_images(draw: ImageDraw, model_dir: Path) -> None:
    """Raise InputError where `prepare_images` would, but for images that cannot be read: none is decoded."""
    load_processor(model_dir)
    found = read_images(draw.source, draw.column, draw.label_column)
    _chosen(found, draw)
    _labels(found, model_dir, draw.source)


def check_probe(fitted: str, judged: str, column: str = "image", label_column: str = "label") -> None:
    """Raise InputError where one of the sources has no labels, or they differ in their classes."""
    sources = {source: read_images(source, column, label_column) for source in (fitted, judged)}
    for source, found in sources.items():
        if found.labels is None:
            raise InputError(f"{source} has no labels, which a linear probe needs; leave out images.probe")
    if sources[fitted].classes != sources[judged].classes:
        raise InputError(f"{fitted} and {judged} differ in their classes; a linear probe (images.probe) needs the same")


def _labels(found: ImageSet, model_dir: Path, source: str) -> Sequence[int] | None:
    """Labels by the numbers of the model's classes; those of the source for a model that has no classes of its own."""
    config = read_model_config(model_dir)
    if found.labels is None or not loss_of(config).has_classes:
        return found.labels
    return model_labels(found, config, source)


def load_processor(model_dir: Path) -> Any:
    """The image processor of a model directory. Raises InputError when there is none that can be read."""
    try:
        with TRANSFORMERS_LOCK:
            from transformers import AutoImageProcessor

            return AutoImageProcessor.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, ImportError) as error:
        raise InputError(
            f"{model_dir} has no image processor that can be read ({str(error).strip().partition(chr(10))[0]}); save "
            "its preprocessor_config.json beside the model"
        ) from error


def model_labels(found: ImageSet, config: Any, source: str) -> Sequence[int]:
    """Labels by the numbers that the model has for the classes of a source.

    Names of classes are looked up among the model's where it has names; numbers are taken as they are. Raises
    InputError for a class or a number that the model does not have.
    """
    assert found.labels is not None
    of_model: dict[str, int] = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if found.classes is None or all(name == f"LABEL_{number}" for name, number in of_model.items()):
        if (largest := max(found.labels)) >= config.num_labels:
            raise InputError(
                f"{source} has a label {largest}, where the model has {config.num_labels} classes; is it trained on "
                "these?"
            )
        return found.labels
    unknown = [found.classes[label] for label in dict.fromkeys(found.labels) if found.classes[label] not in of_model]
    if unknown:
        raise InputError(
            f"{source} has the class {unknown[0]!r} and {len(unknown) - 1} more that the model does not have; its "
            f"classes are {', '.join(list(of_model)[:5])}{', ...' if len(of_model) > 5 else ''}"
        )
    return [of_model[found.classes[label]] for label in found.labels]


def _chosen(found: ImageSet, draw: ImageDraw) -> list[int]:
    """Numbers of the images that are taken."""
    order = seeded_order(len(found.images), draw.seed)
    half = len(order) // 2
    part = {"all": order, "first": order[:half], "second": order[half:]}[draw.part]
    chosen = part[draw.skipped :] if draw.count is None else part[draw.skipped : draw.skipped + draw.count]
    if not chosen or (draw.count is not None and len(chosen) < draw.count):
        asked = "any" if draw.count is None else f"{draw.count:,}"
        of_part = "" if draw.part == "all" else f"{len(part):,} in the {draw.part} half of the "
        behind = f" behind {draw.skipped:,} others" if draw.skipped else ""
        raise InputError(
            f"{draw.source} has {of_part}{len(order):,} images, where {asked}{behind} are asked for; ask for fewer"
        )
    return chosen


def decode(image: StoredImage) -> Any:
    """The image in RGB; None, with a warning that names it, where it cannot be read."""
    try:
        return image.decoded()
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: what PIL says of broken PNG files
        _log.warning("%s cannot be read and is left out: %s", image.name, error)
        return None


def check_readable(lost: int, chosen: int, source: str, share: float, what: str = "images") -> None:
    """Raise InputError where more than a share of what was chosen is lost."""
    if lost > math.floor(share * chosen):
        raise InputError(
            f"{lost:,} of {chosen:,} {what} of {source} cannot be used, where a share of {share:g} may be "
            "(images.unreadable); the log names them"
        )


def write_images(path: Path, images: PreparedImages) -> None:
    """Write prepared images as safetensors."""
    tensors = {"pixels": images.pixels.contiguous()}
    save_file(tensors if images.labels is None else {**tensors, "labels": images.labels}, path)


def read_prepared(path: Path) -> PreparedImages:
    """Inverse of `write_images`. Raises DamagedFile."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is damaged ({error}); remove it, it will be made again") from error
    return PreparedImages(tensors["pixels"], tensors.get("labels"))
