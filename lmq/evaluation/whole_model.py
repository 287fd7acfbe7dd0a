"""Evaluate a model that is opened whole: a checkpoint of lmq by itself, or what another program quantized."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmq.checkpoint.open import open_model_directory, quantization_method
from lmq.errors import InputError, UnsupportedModel
from lmq.evaluation.perplexity import Window, full_windows
from lmq.evaluation.windows import (
    Evaluation,
    last_states,
    prefix_of,
    score_windows,
    summarize,
    window_row,
    window_tokens,
)
from lmq.measurement.divergence import score_tokens
from lmq.model.auto_class import auto_class_of
from lmq.model.causality import require_causal
from lmq.model.discovery import discover, embedding_shape
from lmq.model.streaming import StreamedModel, tokens_at_once
from lmq.model.structure import ModelStructure
from lmq.model.tensors import read_headers, size_bytes
from lmq.model.transformers_lock import TRANSFORMERS_LOCK
from lmq.text.calibration import TextSource, documents, load_tokenizer, text_prefix, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")
_FEW_TOKENS = 8

ReferenceLogits = Callable[[int, slice], Tensor]
"""Full-precision logits [positions, vocabulary] of a window (by number) at a slice of what the model saw of it."""


@torch.no_grad()
def score_whole_model(
    model: PreTrainedModel, windows: Sequence[Window], tokens: Tensor, reference: ReferenceLogits | None = None
) -> list[dict[str, Any]]:
    """Rows of the windows table for a model in memory; `tokens` and `windows` as in
    `lmq.evaluation.windows.score_windows`.

    Raises InputError for a token outside the vocabulary, NotFiniteError naming a window.
    """
    vocabulary = embedding_shape(model)[0]
    if int(tokens.max()) >= vocabulary:
        raise InputError(
            f"token {int(tokens.max())} is outside the model's vocabulary of {vocabulary}; "
            "is the tokenizer the model's own?"
        )
    rows = []
    for index, (window, seen) in enumerate(zip(windows, tokens.long(), strict=True)):
        pieces = []
        for piece, logits in _logits(model, seen, window.scored, tokens_at_once(vocabulary)):
            expected = None if reference is None else reference(index, piece)
            pieces.append(score_tokens(logits, seen[piece.start + 1 : piece.stop + 1], expected))
        rows.append(window_row(window, pieces, prefix_of(window, seen)))
    return rows


def _logits(model: Any, seen: Tensor, scored: int, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits at the positions before the last `scored` tokens, at most `step` positions at a time.

    The cache of keys and values carries a window from piece to piece, so that no more logits are held at once,
    however large the vocabulary. A model without such a cache (Mamba, RWKV) is run from the start for every piece.
    """
    last = len(seen) - 1
    takes = inspect.signature(model.forward).parameters
    cache, fed = None, 0
    for start in range(last - scored, last, step):
        piece = slice(start, min(start + step, last))
        count = piece.stop - piece.start
        options: dict[str, Any] = {"use_cache": scored > step, "logits_to_keep": count}
        if cache is not None:
            options["past_key_values"] = cache
        output = model(
            seen[None, fed : piece.stop].to(model.device),
            **{name: value for name, value in options.items() if name in takes},
        )
        cache = getattr(output, "past_key_values", None)
        fed = piece.stop if cache is not None else 0
        yield piece, output.logits[0, -count:]


def evaluate_checkpoint(
    path: Path, *, text: str, column: str, tokens: int, window: int, stride: int, reference: Path | None = None
) -> Evaluation:
    """Perplexity of a model directory on the first `tokens` tokens of a text, and its divergence from a `reference`.

    `text` and `column` are those of `lmq.text.calibration.TextSource`; the tokenizer is the directory's own. A plain
    model is read block by block where that can be done; any other that transformers opens, and what is quantized by lmq
    or another program, is opened whole, in float32. The reference is the directory of the unquantized model. Raises
    InputError when there is no such directory, text or window, the model does not predict the next token, or the
    reference is another model; DamagedFile for a damaged checkpoint, LmqError for one that does not open,
    NotFiniteError for a model that breaks.
    """
    windows, seen = text_windows(path, text=text, column=column, tokens=tokens, window=window, stride=stride)
    if reference is None:
        return evaluate_windows(path, windows, seen)
    require_same_model(path, reference, None)
    return evaluate_windows(path, windows, seen, open_reference(reference, seen))


def text_windows(
    path: Path, *, text: str, column: str, tokens: int, window: int, stride: int
) -> tuple[list[Window], Tensor]:
    """Windows of a text in the tokens of a model directory, and what the model sees of each [windows, tokens].

    Raises InputError when there is no such directory, text or window, or the model does not predict the next token.
    """
    quantization_method(path)
    require_language_model(path)
    tokenizer = load_tokenizer(path)
    stream = token_stream(documents(TextSource(source=text, column=column), tokenizer), tokenizer, tokens)
    windows = full_windows(len(stream), window, stride)
    return windows, window_tokens(stream, windows, text_prefix(tokenizer))


def evaluate_windows(
    path: Path, windows: Sequence[Window], seen: Tensor, reference: ReferenceLogits | None = None
) -> Evaluation:
    """Perplexity of a model directory on windows of its tokens, and its divergence from the reference's logits.

    Raises as `evaluate_checkpoint`.
    """
    if reference is None and quantization_method(path) is None:
        rows = _rows_by_block(path, windows, seen)
        if rows is not None:
            return summarize(rows)
    return summarize(score_whole_model(_open_whole(path, seen), windows, seen, reference))


def require_language_model(path: Path) -> None:
    """Raise InputError for encoders and other models of which transformers has none that predicts the next token."""
    with TRANSFORMERS_LOCK:
        from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, LookupError):
        return  # whoever opens the model says why it cannot
    if type(config) not in auto_class_of(config)._model_mapping:
        made_as = ", ".join(config.architectures or ()) or config.model_type
        raise InputError(
            f"{path} is a {config.model_type} model ({made_as}), of which transformers has no kind that predicts the "
            "next token (it is an encoder, or encodes its text first): it has no perplexity; give a language model"
        )


def _rows_by_block(path: Path, windows: Sequence[Window], seen: Tensor) -> list[dict[str, Any]] | None:
    """Rows of the windows table, block by block; None for a model that can only be run whole."""
    try:
        model = StreamedModel.open(path, discover(path, weights_sha256="not needed"))
        few = model.embed(seen[:1, :_FEW_TOKENS])
        changed = few.clone()
        changed[:, -1] = few[:, -1].flip(-1) + 1
        inputs = model.block_inputs(few.shape[1])[0]
        with model.block(0) as block:
            require_causal(lambda states: inputs.run(block, states), few, changed, str(path))
        return score_windows(model, windows, seen, last_states(model, seen), None)
    except UnsupportedModel as error:
        _log.info("%s is opened whole: %s", path, error)
        return None


def _open_whole(path: Path, seen: Tensor) -> PreTrainedModel:
    """A model in float32 that predicts the next token."""
    model: Any = open_model_directory(path, dtype=torch.float32, dense=True)
    few = seen[:1, :_FEW_TOKENS].long()
    changed = few.clone()
    changed[:, -1] = (few[:, -1] + 1) % few.max().clamp(min=2)
    require_causal(lambda tokens: model(tokens).logits, few, changed, str(path))
    opened: PreTrainedModel = model
    return opened


def open_reference(reference: Path, seen: Tensor) -> ReferenceLogits:
    """Logits of a model directory on windows of its tokens: block by block where it can, else of the whole model."""
    try:
        structure = discover(reference, weights_sha256="not needed")
        full = StreamedModel.open(reference, structure)
        states = last_states(full, seen)
    except UnsupportedModel:
        whole: Any = _open_whole(reference, seen)

        @functools.lru_cache(maxsize=1)
        def of_window(window: int) -> Tensor:
            logits: Tensor = whole(seen[window : window + 1].long()).logits[0]
            return logits

        return lambda window, piece: of_window(window)[piece]
    return reference_logits(full, states)


def reference_logits(full: StreamedModel, states: Tensor) -> ReferenceLogits:
    """Full-precision logits from the states that leave the last block [windows, tokens, hidden]."""
    return lambda window, piece: full.head_logits(states[window, piece])


def require_same_model(path: Path, source: Path, structure: ModelStructure | None) -> None:
    """Raise InputError unless the checkpoint is one of the source model, by its shape and its tokenizer.

    `structure` is the source's; None for one that is only opened whole, whose configuration is asked. A checkpoint
    without a tokenizer is taken by its shape alone.
    """
    config = _text_config(path)
    if structure is None:
        source_config = _text_config(source)
        expected = {key: source_config[key] for key in _SHAPE if key in source_config}
    else:
        expected = dict(zip(_SHAPE, (structure.hidden_size, structure.layers, structure.vocabulary_size), strict=True))
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise InputError(
                f"{path} is not a checkpoint of this model: its {key} is {config[key]}, the model's is {value}"
            )
    try:
        own = load_tokenizer(path)
    except InputError:
        return
    if own.get_vocab() != load_tokenizer(source).get_vocab():
        raise InputError(
            f"{path} has another tokenizer than the model it is compared with, so that their tokens differ; "
            "give a checkpoint of the same model"
        )


def stored_bytes(path: Path, structure: ModelStructure) -> tuple[int, int]:
    """Bytes of the quantized matrices of a checkpoint, and of all its files, from the headers of its tensors.

    A matrix is every tensor under its module's name but the bias: codes, scales, zeros, permutations.
    """
    prefixes = {f"{structure.path(module.id)}." for module in structure.modules}
    matrices = sum(
        size_bytes(tensor)
        for name, tensor in read_headers(path).items()
        if f"{name.rpartition('.')[0]}." in prefixes and not name.endswith(".bias")
    )
    return matrices, sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _text_config(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text("utf-8"))
    return config.get("text_config") or config
