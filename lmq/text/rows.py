"""Rows of tables and data sets as texts: what is not text is left out and counted, conversations are written out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lmq.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

CHAT_COLUMNS = ("messages", "conversations")
"""Columns of conversations, taken where the column of texts is not there."""

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Speakers of the ShareGPT format (`from`, `value`) by the names of chat templates (`role`, `content`)."""


def text_column(columns: Iterable[str], wanted: str, source: str) -> str:
    """The wanted column, or one of conversations in its place. Raises InputError naming the columns there are."""
    there = list(columns)
    found = next((name for name in (wanted, *CHAT_COLUMNS) if name in there), None)
    if found is None:
        raise InputError(f"{source} has no column {wanted!r} (it has: {', '.join(there)}); set `column`")
    return found


def texts_of_rows(
    values: Iterable[Any], column: str, source: str, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The texts among `values`; lists of messages are written out by the tokenizer's chat template.

    Other values (null, numbers) are left out, with a warning that counts them. Raises InputError where no text is
    left, and for conversations without a chat template.
    """
    texts: list[str] = []
    left_out: Counter[str] = Counter()
    for value in values:
        if isinstance(value, str):
            texts.append(without_lone_surrogates(value))
        elif messages := _messages(value):
            texts.append(_written_out(messages, source, tokenizer))
        else:
            left_out["null" if value is None else type(value).__name__] += 1
    counted = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
    if not texts:
        raise InputError(f"column {column!r} of {source} holds no text ({counted or 'no rows'}); set `column`")
    if left_out:
        _log.warning(
            "%d of %d rows of %s have no text in column %r and are left out: %s",
            left_out.total(), left_out.total() + len(texts), source, column, counted,
        )  # fmt: skip
    return texts


def without_lone_surrogates(text: str) -> str:
    """A text with halves of surrogate pairs, which JSON can hold and no tokenizer takes, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _messages(value: Any) -> list[dict[str, str]]:
    """A conversation with the keys of chat templates; empty for what is none."""
    if not isinstance(value, Sequence) or isinstance(value, bytes | str):
        return []
    found = []
    for item in value:
        if not isinstance(item, Mapping):
            return []
        role = item.get("role") or _ROLES.get(str(item.get("from")), item.get("from"))
        content = item.get("content") if "content" in item else item.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            return []
        found.append({"role": role, "content": without_lone_surrogates(content)})
    return found


def _written_out(messages: list[dict[str, str]], source: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            f"{source} holds conversations, and the model's tokenizer has no chat template to write them out with; "
            "pass plain text, or a model with a chat template"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses a conversation of {source}: {error}") from error
