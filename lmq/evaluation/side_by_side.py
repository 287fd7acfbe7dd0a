"""Several model directories judged on the same text, each against one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmq.errors import LmqError
from lmq.evaluation.whole_model import evaluate_windows, open_reference, text_windows
from lmq.evaluation.windows import Evaluation
from lmq.model.skeleton import read_model_config
from lmq.text.calibration import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A model directory, the bytes of its files, and how it was judged.

    `note` says why it has no divergence from the reference; `error` why it was not judged at all.
    """

    path: Path
    disk_bytes: int
    evaluation: Evaluation | None = None
    note: str | None = None
    error: str | None = None


def compare_models(
    paths: Sequence[Path], reference: Path, watch: Callable[[Path], None] = lambda path: None, **text: Any
) -> list[ComparedModel]:
    """Perplexity of model directories on a text, and their divergence (KL, top-1) from the `reference`.

    `text` are the options of `lmq.evaluation.whole_model.text_windows`; `watch` is told of each model before its turn.
    The reference is run once. A divergence needs the same tokens and as many logits: a model with another tokenizer or
    vocabulary has a note in its place. A model that does not open or breaks has an error, and the others are judged.
    Raises as `text_windows` for the reference, and for a directory that is none.
    """
    seen_by = {path: text_windows(path, **text) for path in dict.fromkeys([reference, *paths])}
    notes = {path: _other_tokens(path, reference) for path in paths}
    watch(reference)
    logits = None
    if any(note is None and path != reference for path, note in notes.items()):
        logits = open_reference(reference, seen_by[reference][1])
    found = []
    for path in paths:
        watch(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        expected = None if path == reference or notes[path] is not None else logits
        try:
            evaluation = evaluate_windows(path, *seen_by[path], expected)
        except LmqError as error:
            found.append(ComparedModel(path=path, disk_bytes=size, error=str(error)))
        else:
            found.append(ComparedModel(path=path, disk_bytes=size, evaluation=evaluation, note=notes[path]))
    return found


def _other_tokens(path: Path, reference: Path) -> str | None:
    """Why predictions of two models cannot be compared token by token; None where they can."""
    own, other = (load_tokenizer(each).get_vocab() for each in (path, reference))
    if own != other:
        return (
            f"its tokenizer ({len(own):,} tokens) is another than that of {reference} ({len(other):,} tokens): "
            "no divergence, and perplexities per token do not compare"
        )
    rows, expected = (read_model_config(each).get_text_config().vocab_size for each in (path, reference))
    if rows != expected:
        return f"it has {rows:,} logits where {reference} has {expected:,}: no divergence"
    return None
