"""A new export: the plain model, its weights in a single file whatever their size."""

from __future__ import annotations

from pathlib import Path

from lmq.export import dense
from lmq.export.report import ExportReport
from lmq.export.source import QuantizedCheckpoint


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Empty: every checkpoint of lmq can be written so."""
    return []


def export(checkpoint: QuantizedCheckpoint, target: Path) -> ExportReport:
    """Write the directory `target`. Raises InputError where it exists."""
    return dense.export(checkpoint, target, dtype="float32", max_shard_bytes=2**62)
