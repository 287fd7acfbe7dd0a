"""Text to measure and to judge models on: read as documents, split, and packed into blocks of tokens."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lmq.errors import InputError, unknown_name
from lmq.model.source import nearest_sibling
from lmq.model.transformers_lock import TRANSFORMERS_LOCK
from lmq.tables import TableSchema, read_table, write_table
from lmq.text.data_sets import PREFIX as DATA_SET
from lmq.text.data_sets import read_data_set
from lmq.text.files import read_text_file
from lmq.text.known_texts import KNOWN_TEXTS, read_known_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_SCHEMA = TableSchema(
    "tokens",
    1,
    pa.schema(
        [
            pa.field("sequence", pa.int32(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
        ]
    ),
)

PYDOC_TOPICS = "pydoc-topics"
_PROBE = "a"
DOCUMENT_SEPARATOR = "\n\n"
_PARTS = ("all", "first", "second")
_INSTEAD = f"pass a .txt, .jsonl or .parquet file, {', '.join(KNOWN_TEXTS)} or {PYDOC_TOPICS} instead"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from, and which of its documents are taken.

    `source` is `pydoc-topics` (technical English that comes with Python), one of `lmq.text.known_texts` (wikitext2, c4,
    ptb), a file, or a data set (`lmq.text.data_sets`; split `train` unless given). `column` is the field that holds the
    text of json, jsonl, parquet and data sets; where it is missing, conversations in `messages` are taken. `part`
    "first" and "second" are two halves of its distinct documents, drawn by `seed`. A plain file (.txt, .raw, .md, ...)
    is one document, or, when a part is asked for, its paragraphs are.
    """

    source: str = PYDOC_TOPICS
    column: str = "text"
    part: str = "all"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.part not in _PARTS:
            raise unknown_name("part of a text", self.part, _PARTS)


def is_file_text(source: str) -> bool:
    """Whether a text is given as a file, and not by one of the names that mean the same on every machine."""
    return source != PYDOC_TOPICS and source not in KNOWN_TEXTS and not source.startswith(DATA_SET)


def documents(source: TextSource, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The documents of a source, in its order, of the part that is asked for.

    Conversations are written out by the chat template of `tokenizer`. Raises InputError for a missing file or column,
    an empty text, a data set that cannot be fetched, and for a part of a single document.
    """
    found = _read(source, tokenizer)
    if not any(text.strip() for text in found):
        raise InputError(f"{source.source} holds no text; {_INSTEAD}")
    if source.part == "all":
        return found
    distinct = list(dict.fromkeys(found))
    if len(distinct) < 2:
        raise InputError(f"{source.source} is one document, of which no part can be taken; pass more, or part 'all'")
    order = seeded_order(len(distinct), source.seed)
    half = len(distinct) // 2
    return [distinct[index] for index in sorted(order[:half] if source.part == "first" else order[half:])]


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises InputError when there is none that can be read."""
    try:
        with TRANSFORMERS_LOCK:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"{model_dir} has no tokenizer that can be read ({error}); save it beside the model"
        ) from error


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text, found by encoding one: one, several, or none."""
    token_ids, plain = (tokenizer(_PROBE, add_special_tokens=add, verbose=False).input_ids for add in (True, False))
    starts = range(len(token_ids) - len(plain) + 1)
    start = next((start for start in starts if token_ids[start : start + len(plain)] == plain), None)
    if start is None:  # the first word is another token behind a prefix
        special = set(tokenizer.all_special_ids)
        start = next((place for place, token in enumerate(token_ids) if token not in special), 0)
    return list(token_ids[:start])


def pack_tokens(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    sequences: int,
    seed: int = 42,
) -> Tensor:
    """Blocks of tokens int32 [sequences, sequence_length] from documents shuffled by `seed` and joined.

    Every block begins with what the tokenizer puts in front of a text: some models (Gemma) are useless without.
    Raises InputError with the number of tokens there are and are needed.
    """
    shuffled = [texts[index] for index in seeded_order(len(texts), seed)]
    prefix = text_prefix(tokenizer)
    text_length = sequence_length - len(prefix)
    if text_length < 1:
        raise InputError(
            f"sequence_length = {sequence_length} leaves no room for text behind the {len(prefix)} tokens that the "
            "tokenizer puts in front; make it longer"
        )
    needed = sequences * text_length
    tokens = _encode(DOCUMENT_SEPARATOR.join(shuffled), tokenizer, needed)
    if len(tokens) < needed:
        raise InputError(
            f"the calibration text has {len(tokens):,} tokens where {sequences} sequences of {text_length} need "
            f"{needed:,}; give a longer text, or fewer or shorter sequences"
        )
    return behind_prefix(tokens.view(sequences, text_length), prefix)


def behind_prefix(tokens: Tensor, prefix: Sequence[int]) -> Tensor:
    """Rows of tokens [rows, tokens], each with the tokens of `prefix` put in front."""
    front = torch.tensor(list(prefix), dtype=tokens.dtype).expand(len(tokens), len(prefix))
    return torch.cat([front, tokens], dim=1)


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> Tensor:
    """The first `max_tokens` tokens (None: all), int32 [tokens], of documents joined by an empty line, no prefix."""
    return _encode(DOCUMENT_SEPARATOR.join(texts), tokenizer, max_tokens)


def write_tokens(path: Path, tokens: Tensor) -> None:
    """Write tokens [sequences, sequence_length] as one row per token."""
    sequences, length = tokens.shape
    columns = {
        "sequence": np.repeat(np.arange(sequences, dtype=np.int32), length),
        "position": np.tile(np.arange(length, dtype=np.int32), sequences),
        "token_id": tokens.flatten().to(torch.int32).numpy(),
    }
    write_table(path, TOKENS_SCHEMA, pa.table(columns))


def read_tokens(path: Path) -> Tensor:
    """Inverse of `write_tokens`: int32 [sequences, sequence_length]. Raises DamagedFile."""
    table = read_table(path, TOKENS_SCHEMA)
    sequences = table.column("sequence")[-1].as_py() + 1
    return torch.from_numpy(table.column("token_id").to_numpy().copy()).view(sequences, -1)


def tokens_fingerprint(tokens: Tensor) -> str:
    """Sha256 of the tokens and their shape."""
    values = tokens.to(torch.int32).contiguous().numpy().astype("<i4")
    return hashlib.sha256(json.dumps(list(tokens.shape)).encode() + values.tobytes()).hexdigest()


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> Tensor:
    """At most `max_tokens` tokens of a text, without encoding much more of it than that takes."""
    characters = len(text) if max_tokens is None else min(len(text), 8 * max_tokens)
    while True:
        token_ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        # the cut can change the tokens next to it, so they must lie behind those that are kept
        if characters == len(text) or (max_tokens is not None and len(token_ids) >= max_tokens + 64):
            return torch.tensor(token_ids[:max_tokens], dtype=torch.int32)
        characters = min(len(text), 2 * characters)


def seeded_order(count: int, seed: int) -> list[int]:
    """A permutation that depends on the seed alone, not on the version of a random generator."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())


def _read(source: TextSource, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if source.source == PYDOC_TOPICS:
        return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    if source.source in KNOWN_TEXTS:
        return read_known_text(source.source)
    if source.source.startswith(DATA_SET):
        return read_data_set(source.source, source.column, tokenizer, instead=_INSTEAD)
    path = Path(source.source).expanduser()
    if not path.is_file():
        if not path.suffix and path.parent == Path():
            raise unknown_name("text", source.source, (PYDOC_TOPICS, *KNOWN_TEXTS, "dataset:ORG/NAME", "FILE.txt"))
        raise InputError(f"there is no file {path}{nearest_sibling(path)}")
    return read_text_file(path, source.column, tokenizer, paragraphs=source.part != "all", instead=_INSTEAD)
