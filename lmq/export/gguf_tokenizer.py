"""The tokenizer of a checkpoint as GGUF metadata: tokens, types, merges or scores, special tokens, chat template.

llama.cpp knows two kinds that tokenizers.json describe as BPE: `gpt2` works on bytes spelled as letters, with the
merges and the name of a known rule for splitting text; `llama` (SentencePiece) works on characters and joins the
pair whose result has the highest score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_SPLITS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", QWEN2_SPLIT), ("ByteLevel", False)): "qwen2",
    (("Split", _LLAMA3_SPLIT), ("ByteLevel", False)): "llama-bpe",
}
"""llama.cpp's names of the rules for splitting text, by the steps of the pre-tokenizer."""


class GgufTokenizer:
    """The tokenizer that transformers opens in a model directory, read for GGUF.

    `vocabulary_size` is the number of rows of the embedding, which may have more than there are tokens.
    """

    def __init__(self, model_dir: Path, vocabulary_size: int):
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        self._vocabulary_size = vocabulary_size
        self._data: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self._model: dict[str, Any] = self._data["model"]
        self._added = {token["id"]: token for token in self._data["added_tokens"]}

    def problems(self) -> Iterator[str]:
        """What llama.cpp's tokenizers cannot do."""
        if self._kind is None:
            yield f"the tokenizer ({self._model['type']}) is neither byte-level BPE nor SentencePiece-like BPE"
        elif self._kind == "gpt2" and self._split_name is None:
            steps = [kind for kind, _ in self._split_steps]
            yield f"the tokenizer splits text by a rule that llama.cpp has no known name for (steps: {steps})"
        if len(self._tokenizer) > self._vocabulary_size:
            yield f"the tokenizer has {len(self._tokenizer)} tokens, the embedding {self._vocabulary_size} rows"

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Write a tokenizer that has no `problems`."""
        tokens, types = self._tokens()
        writer.add_tokenizer_model(str(self._kind))
        writer.add_token_list(tokens)
        if self._kind == "gpt2":
            writer.add_tokenizer_pre(str(self._split_name))
            writer.add_token_types(types)
            writer.add_token_merges([" ".join(pair) for pair in self._model["merges"]])
        else:
            writer.add_tokenizer_pre("default")
            writer.add_token_scores(self._scores(tokens))
            writer.add_token_types(types)
        writer.add_add_space_prefix(self._prepends_space)
        self._add_special_tokens(writer)

    @property
    def _kind(self) -> str | None:
        if self._model["type"] != "BPE":
            return None
        if any(kind == "ByteLevel" for kind, _ in self._split_steps):
            return "gpt2"
        return "llama" if self._model["byte_fallback"] else None

    @property
    def _split_steps(self) -> tuple[tuple[str, Any], ...]:
        """Type and defining option of each step of the pre-tokenizer."""
        options = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Split": "pattern"}
        steps = _steps(self._data["pre_tokenizer"])
        values = [(step["type"], step.get(options.get(step["type"], ""))) for step in steps]
        return tuple((kind, value.get("Regex") if isinstance(value, dict) else value) for kind, value in values)

    @property
    def _split_name(self) -> str | None:
        return _SPLITS.get(self._split_steps)

    @property
    def _prepends_space(self) -> bool:
        steps = [*_steps(self._data["normalizer"]), *_steps(self._data["pre_tokenizer"])]
        return any(
            step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" or step.get("add_prefix_space")
            for step in steps
        )

    def _tokens(self) -> tuple[list[str], list[TokenType]]:
        """Text and type of every row of the embedding."""
        texts = {index: text for text, index in self._model["vocab"].items()}
        tokens, types = [], []
        for index in range(self._vocabulary_size):
            added, text = self._added.get(index), texts.get(index)
            if added is not None:
                text, kind = added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
                if self._kind == "llama":  # matched in the text before its spaces are replaced
                    text = text.replace("\u2581", " ")
            elif text is None:
                text, kind = f"[PAD{index}]", TokenType.UNUSED
            else:
                kind = TokenType.BYTE if self._kind == "llama" and _is_byte(text) else TokenType.NORMAL
            if index == self._tokenizer.unk_token_id and self._kind == "llama":
                kind = TokenType.UNKNOWN
            tokens.append(text)
            types.append(kind)
        return tokens, types

    def _scores(self, tokens: list[str]) -> list[float]:
        """Minus the rank of the first merge that makes each token; the lowest for tokens that none makes."""
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(self._model["merges"]):
            ranks.setdefault("".join(pair), rank)
        return [-float(ranks.get(token, len(self._model["merges"]))) for token in tokens]

    def _add_special_tokens(self, writer: gguf.GGUFWriter) -> None:
        tokenizer = self._tokenizer
        for index, add in (
            (tokenizer.bos_token_id, writer.add_bos_token_id),
            (tokenizer.eos_token_id, writer.add_eos_token_id),
            (tokenizer.unk_token_id, writer.add_unk_token_id),
            (tokenizer.pad_token_id, writer.add_pad_token_id),
        ):
            if index is not None:
                add(index)
        encoded = tokenizer("a")["input_ids"]
        writer.add_add_bos_token(encoded[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(encoded[-1] == tokenizer.eos_token_id)
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if template:
            writer.add_chat_template(template)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in order."""
    if step is None:
        return []
    return step.get("pretokenizers") or step.get("normalizers") or [step]


def _is_byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None
