"""What a model is evaluated on unless somebody says otherwise; imports nothing, so that `lmq --help` is immediate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Tokens of a text, and the windows that a model sees them in (both counted in tokens).

    `source` is a file, the name of a known text, or `dataset:NAME`; `column` is the field that holds the text.
    `stride` tokens of each window are scored, the others are context.
    """

    source: str = "pydoc-topics"
    column: str = "text"
    tokens: int = 8192
    window: int = 1024
    stride: int = 512
