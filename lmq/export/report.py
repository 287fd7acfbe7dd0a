"""What an export wrote, and how much each matrix changed on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ModuleStep:
    """What one quantized matrix became.

    `target` is the type in the words of the target format (`Q4_1`, `bfloat16`); `relative_error` is
    ||W_written - W_checkpoint||_F / ||W_checkpoint||_F, 0 where the format holds the same values.
    """

    target: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export: where it is, how large, and the step of each quantized matrix by its dotted path."""

    path: Path
    """What was written: a directory, or one .gguf file."""
    size_bytes: int
    """Of all files."""
    steps: Mapping[str, ModuleStep]
    notes: tuple[str, ...] = ()
    """What the reader of the report should know: what was left out or changed besides the quantized matrices."""
    unread_settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that transformers, which opens it for the check, does not take from it."""


def relative_error(written: Tensor, original: Tensor) -> float:
    """||written - original||_F / ||original||_F of a matrix and its float32 original, summed in float64."""
    error, size = (
        float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        for matrix in (written.float() - original, original)
    )
    return error / size if error else 0.0


def overall_relative_error(steps: Mapping[str, ModuleStep], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Root mean square of the relative errors of the steps, each matrix weighted by its number of weights."""
    weights = {path: shapes[path][0] * shapes[path][1] for path in steps}
    squares = sum(weights[path] * step.relative_error**2 for path, step in steps.items())
    return sqrt(squares / sum(weights.values())) if steps else 0.0


def directory_bytes(directory: Path) -> int:
    """Bytes of the files of a directory, those of its subdirectories included."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
