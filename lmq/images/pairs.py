"""Images with their texts as a vision-language model takes them: through its own processor, packed into sequences."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmq.errors import DamagedFile, InputError
from lmq.images.prepared import check_readable, decode
from lmq.images.sources import read_pairs
from lmq.model.transformers_lock import TRANSFORMERS_LOCK
from lmq.text.calibration import seeded_order

_log = logging.getLogger(__name__)

SCHEMA = "pairs/1"
_TOKEN_IDS, _IS_TEXT = "token_ids", "is_text"


@dataclass(frozen=True, kw_only=True)
class PairDraw:
    """Which pairs of a source are taken: as many as fill the sequences, in an order drawn by `seed`.

    At most a share `unreadable` of the pairs that are taken may have no text, an image that cannot be read, or more
    tokens than the processor or a sequence takes; these are left out.
    """

    source: str
    text_column: str
    column: str = "image"
    seed: int = 42
    sequences: int
    sequence_length: int
    unreadable: float = 0.01


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """Pairs joined to sequences, each of which begins with a pair and ends in the middle of one.

    `token_ids` int32 [sequences, sequence_length] hold image tokens in the place of images; `is_text` bool of that
    shape says which tokens are those of texts, and neither of images nor special ones. `pairs` are those of every
    sequence as the model takes them: `input_ids` [1, tokens] and the tensors of the image.
    """

    token_ids: Tensor
    is_text: Tensor
    pairs: tuple[tuple[Mapping[str, Tensor], ...], ...]


def pack_pairs(draw: PairDraw, model_dir: Path) -> PackedPairs:
    """Draw pairs, prepare them for the model of a directory, and join them.

    Raises InputError where the source has too few pairs, more of them than allowed cannot be used, the model has no
    processor, or a sequence holds no text behind an image.
    """
    processor = load_pair_processor(model_dir)
    groups: list[list[Mapping[str, Tensor]]] = [[]]
    taken = lost = 0
    for pair in _prepared(draw, processor):
        taken += 1
        if pair is None:
            lost += 1
            continue
        if _tokens(groups[-1]) >= draw.sequence_length:
            groups.append([])
        groups[-1].append(pair)
        if len(groups) == draw.sequences and _tokens(groups[-1]) >= draw.sequence_length:
            break
    check_readable(lost, taken, draw.source, draw.unreadable, "pairs of image and text")
    if (full := sum(_tokens(group) >= draw.sequence_length for group in groups)) < draw.sequences:
        raise InputError(
            f"the pairs of {draw.source} fill {full:,} sequences of {draw.sequence_length} tokens, where "
            f"{draw.sequences:,} are asked for; set calibration.sequences or sequence_length lower"
        )
    rows = [torch.cat([pair["input_ids"][0] for pair in group])[: draw.sequence_length] for group in groups]
    token_ids = torch.stack(rows).to(torch.int32)
    return PackedPairs(token_ids, _is_text(token_ids, processor), tuple(map(tuple, groups)))


def _tokens(pairs: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(pair["input_ids"].shape[1] for pair in pairs)


def first_pair(draw: PairDraw, model_dir: Path) -> Mapping[str, Tensor]:
    """The pair that is taken first. Raises InputError as `pack_pairs`, but for what later pairs have."""
    found = _prepared(draw, load_pair_processor(model_dir))
    pair = next((pair for pair in found if pair is not None), None)
    if pair is None:
        raise InputError(f"{draw.source} has no image with a text in {draw.text_column!r}; set images.text_column")
    return pair


def sample_pair(model_dir: Path) -> Mapping[str, Tensor]:
    """An arbitrary pair as the model of a directory takes it. Raises InputError without a processor that makes one."""
    from PIL import Image  # takes a moment

    return _processed(load_pair_processor(model_dir), Image.new("RGB", (64, 64)), "a", "a black image")


def load_pair_processor(model_dir: Path) -> Any:
    """The processor of a vision-language model. Raises InputError when there is none that can be read."""
    try:
        with TRANSFORMERS_LOCK:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
            why = "what is there is for texts or images alone"
    except (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError) as error:
        processor, why = None, str(error).strip().partition("\n")[0]
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(
            f"{model_dir} has no processor of images with text that can be read ({why}); save its "
            "processor_config.json, preprocessor_config.json and tokenizer beside the model"
        )
    if not processor.chat_template and getattr(processor, "image_token", None) is None:
        raise InputError(
            f"the processor of {model_dir} has neither a chat template nor an image_token, which says where an "
            "image goes; save one of them with it"
        )
    return processor


def _prepared(draw: PairDraw, processor: Any) -> Iterator[Mapping[str, Tensor] | None]:
    """Pairs as the model takes them, one after the other; None for one that cannot be used, which the log names.

    Raises InputError where the processor refuses a pair before it has taken any, or where that pair is too long.
    """
    pairs = read_pairs(draw.source, draw.column, draw.text_column)
    is_first = True
    for number in seeded_order(len(pairs), draw.seed):
        image, text = pairs[number]
        if not isinstance(text, str) or not text.strip():
            _log.warning("%s has no text in %r and is left out", image.name, draw.text_column)
            yield None
        elif (decoded := decode(image)) is None:
            yield None
        else:
            try:
                pair = _checked(_processed(processor, decoded, text, image.name), image.name, draw, processor)
            except InputError as error:
                if is_first:
                    raise
                _log.warning("a pair is left out: %s", error)
                yield None
            else:
                is_first = False
                yield pair


def _processed(processor: Any, image: Any, text: str, name: str) -> dict[str, Tensor]:
    """What the processor makes of an image, and of a text that answers it where there is a chat template, else
    follows it.

    Raises InputError naming the pair that it refuses.
    """
    token = getattr(processor, "image_token", None)
    words = (text.replace(token, "") if token else text).strip()
    try:
        if processor.chat_template:
            messages = [
                {"role": "user", "content": [{"type": "image", "image": image}]},
                {"role": "assistant", "content": [{"type": "text", "text": words}]},
            ]
            found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        else:
            found = processor(images=[image], text=[f"{token}{words}"], return_tensors="pt")
    except (ValueError, TypeError, LookupError, RuntimeError, ImportError, TemplateError) as error:
        raise InputError(f"the model's processor refuses {name}: {str(error).strip().partition(chr(10))[0]}") from error
    # a pair by itself is not padded: the model makes the mask that it has without one
    return {key: value for key, value in found.items() if isinstance(value, Tensor) and key != "attention_mask"}


def _checked(pair: dict[str, Tensor], name: str, draw: PairDraw, processor: Any) -> dict[str, Tensor]:
    """The pair, if a sequence that begins with it holds some of its text."""
    token_ids = pair["input_ids"]
    if not bool(_is_text(token_ids, processor)[:, 1 : draw.sequence_length].any()):
        raise InputError(
            f"{name} with its text takes {token_ids.shape[1]} tokens, of which the first {draw.sequence_length} "
            f"hold no text; set calibration.sequence_length to {token_ids.shape[1]} or more"
        )
    return pair


def _is_text(token_ids: Tensor, processor: Any) -> Tensor:
    """Which tokens are those of a text, and neither of an image nor special ones."""
    tokenizer = processor.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, getattr(processor, "image_token_id", None)} - {None}
    return ~torch.isin(token_ids, torch.tensor(sorted(special), dtype=token_ids.dtype))


def write_pairs(path: Path, packed: PackedPairs) -> None:
    """Write pairs as safetensors."""
    tensors = {_TOKEN_IDS: packed.token_ids, _IS_TEXT: packed.is_text}
    for sequence, pairs in enumerate(packed.pairs):
        for number, pair in enumerate(pairs):
            tensors |= {f"{sequence}.{number}.{name}": tensor.contiguous() for name, tensor in pair.items()}
    save_file(tensors, path)


def read_packed(path: Path) -> PackedPairs:
    """Inverse of `write_pairs`. Raises DamagedFile."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is damaged ({error}); remove it, it will be made again") from error
    token_ids, is_text = tensors.pop(_TOKEN_IDS), tensors.pop(_IS_TEXT)
    groups: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        sequence, number, name = key.split(".", 2)
        groups.setdefault(int(sequence), {}).setdefault(int(number), {})[name] = tensor
    pairs = tuple(tuple(group[number] for number in range(len(group))) for _, group in sorted(groups.items()))
    return PackedPairs(token_ids, is_text, pairs)
