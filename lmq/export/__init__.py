"""Checkpoints of lmq written in the formats of other programs.

Every format is a module with `problems(checkpoint)`, what it cannot hold of a checkpoint, and
`export(checkpoint, target, **options)`, which writes it and reports what every matrix became.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from safetensors import SafetensorError

from lmq.errors import InputError, LmqError, unknown_name

if TYPE_CHECKING:
    from lmq.export.report import ExportReport
    from lmq.export.source import QuantizedCheckpoint


class Exporter(Protocol):
    """The module of a format."""

    def problems(self, checkpoint: QuantizedCheckpoint) -> list[str]:
        """What the format cannot hold; empty where the checkpoint can be exported."""

    def export(self, checkpoint: QuantizedCheckpoint, target: Path, **options: str) -> ExportReport:
        """Write `target`, all of it or nothing. Raises InputError listing the problems."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format: what it is for, the module that writes it, and the options that its `export` takes."""

    summary: str
    module: str
    options: tuple[str, ...] = ()

    def exporter(self) -> Exporter:
        """The module of the format, imported only now: some import large libraries."""
        return cast(Exporter, importlib.import_module(self.module))


FORMATS: Mapping[str, ExportFormat] = {
    "safetensors": ExportFormat(
        summary="a plain model with the quantized values, for any program",
        module="lmq.export.dense",
        options=("dtype",),
    ),
    "hqq": ExportFormat(summary="a checkpoint of the hqq library", module="lmq.export.hqq", options=("dtype",)),
    "gguf": ExportFormat(
        summary="a file for llama.cpp and its relatives", module="lmq.export.gguf", options=("fidelity", "tensor_types")
    ),
    "compressed-tensors": ExportFormat(
        summary="packed integers and 4-bit floats for vLLM", module="lmq.export.compressed_tensors"
    ),
    "gptq": ExportFormat(
        summary="packed integers of GPTQ, bits by module, for GPTQModel and SGLang", module="lmq.export.gptq"
    ),
    "auto-round": ExportFormat(
        summary="packed integers of AutoRound, bits by module, for transformers", module="lmq.export.auto_round"
    ),
    "awq": ExportFormat(summary="packed 4-bit integers of AWQ, for vLLM", module="lmq.export.awq"),
}


def export_format(name: str) -> ExportFormat:
    """The format of a name. Raises InputError for an unknown one."""
    if name not in FORMATS:
        raise unknown_name("export format", name, FORMATS)
    return FORMATS[name]


def write_export(
    checkpoint: QuantizedCheckpoint, target: Path, format_name: str, options: Mapping[str, str]
) -> ExportReport:
    """Write `target`, all of it or nothing, without a look at what was written.

    Raises InputError for what cannot be exported, LmqError where it cannot be written.
    """
    from lmq.model.auto_class import loss_of
    from lmq.model.skeleton import read_model_config

    exporter = export_format(format_name).exporter()
    if not loss_of(read_model_config(checkpoint.path)).per_token:
        raise InputError(
            f"{checkpoint.path} sees images, and exports are of language models; open it with "
            "lmq.load(..., dense=True) and write a plain model with save_pretrained"
        )
    try:
        return exporter.export(checkpoint, target, **options)
    except (OSError, SafetensorError) as error:
        raise LmqError(
            f"the export could not be written to {target.parent} ({error}); nothing of it is left. "
            "See that the disk has room and that the place may be written to, then export again"
        ) from error
