"""Evaluate a model that is opened whole: a checkpoint of lmq by itself, or what another program quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmq.checkpoint.open import open_model_directory, quantization_method
from lmq.errors import InputError
from lmq.evaluation.perplexity import Window, full_windows
from lmq.evaluation.windows import Evaluation, last_states, score_windows, summarize, window_row, window_tokens
from lmq.measurement.divergence import score_tokens
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel, tokens_at_once
from lmq.model.structure import ModelStructure
from lmq.model.tensors import read_headers, size_bytes
from lmq.text.calibration import TextSource, bos_prefix, documents, load_tokenizer, token_stream

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
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
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
        rows.append(window_row(window, pieces))
    return rows


def _logits(model: Any, seen: Tensor, scored: int, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits at the positions before the last `scored` tokens, at most `step` positions at a time.

    The cache of keys and values carries a window from piece to piece, so that no more logits are held at once,
    however large the vocabulary.
    """
    last = len(seen) - 1
    cache, fed = None, 0
    for start in range(last - scored, last, step):
        piece = slice(start, min(start + step, last))
        inputs = seen[None, fed : piece.stop].to(model.device)
        output = model(inputs, past_key_values=cache, use_cache=scored > step, logits_to_keep=piece.stop - piece.start)
        cache, fed = output.past_key_values, piece.stop
        yield piece, output.logits[0]


def evaluate_checkpoint(
    path: Path, *, text: str, column: str, tokens: int, window: int, stride: int, reference: Path | None = None
) -> Evaluation:
    """Perplexity of a model directory on the first `tokens` tokens of a text, and its divergence from a `reference`.

    `text` and `column` are those of `lmq.text.calibration.TextSource`; the tokenizer is the directory's own. A plain
    model is read block by block; what is quantized, by lmq or another program, is opened whole, in float32. The
    reference is the directory of the unquantized model. Raises InputError when there is no such directory, text or
    window, or the reference is another model; DamagedFile for a damaged checkpoint, LmqError for one that does not
    open, NotFiniteError for a model that breaks.
    """
    method = quantization_method(path)
    tokenizer = load_tokenizer(path)
    stream = token_stream(documents(TextSource(source=text, column=column)), tokenizer, tokens)
    windows = full_windows(len(stream), window, stride)
    seen = window_tokens(stream, windows, bos_prefix(tokenizer))
    logits = None
    if reference is not None:
        structure = discover(reference, weights_sha256="not needed")
        require_same_model(path, reference, structure)
        full = StreamedModel.open(reference, structure)
        logits = reference_logits(full, last_states(full, seen))
    if method is None and logits is None:
        model = StreamedModel.open(path, discover(path, weights_sha256="not needed"))
        return summarize(score_windows(model, windows, seen, last_states(model, seen), None))
    whole = open_model_directory(path, dtype=torch.float32, dense=True)
    return summarize(score_whole_model(whole, windows, seen, logits))


def reference_logits(full: StreamedModel, states: Tensor) -> ReferenceLogits:
    """Full-precision logits from the states that leave the last block [windows, tokens, hidden]."""
    return lambda window, piece: full.head_logits(states[window, piece])


def require_same_model(path: Path, source: Path, structure: ModelStructure) -> None:
    """Raise InputError unless the checkpoint is one of the source model, by its shape and its tokenizer.

    `structure` is the source's. A checkpoint without a tokenizer is taken by its shape alone.
    """
    config = _text_config(path)
    expected = {
        "hidden_size": structure.hidden_size,
        "num_hidden_layers": structure.layers,
        "vocab_size": structure.vocabulary_size,
    }
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
