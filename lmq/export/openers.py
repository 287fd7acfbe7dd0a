"""Opening of exports as their users open them, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lmq.checkpoint.open import open_dense
from lmq.errors import InputError, LmqError, UnsupportedModel
from lmq.export.report import ExportReport
from lmq.model.auto_class import auto_class_of
from lmq.model.skeleton import read_model_config
from lmq.model.transformers_lock import TRANSFORMERS_LOCK

_DOES_NOT_OPEN = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What loaders raise for files that are not what they expect."""


def open_export(report: ExportReport, format_name: str) -> PreTrainedModel:
    """The model of an export, for evaluation.

    Raises LmqError where it does not open, or not completely, InputError where the package that opens it is missing.
    """
    path = report.path
    try:
        return _OPENERS.get(format_name, _open_directory)(report).eval()
    except ImportError as error:
        raise InputError(
            f"{path} is written; the check needs a package that is missing: {error}. "
            "Install it, as with `pip install 'lmq[vllm]'`, or export without the check"
        ) from error
    except (*_DOES_NOT_OPEN, UnsupportedModel) as error:
        raise LmqError(f"{path} is written, but does not open as {format_name}: {error}") from error


def open_tokenizer(report: ExportReport, format_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an export. Raises LmqError where it does not open."""
    place, options = report.path, {}
    if format_name == "gguf":
        place, options = report.path.parent, {"gguf_file": report.path.name}
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False, **options)
    except _DOES_NOT_OPEN as error:
        raise LmqError(f"{report.path} is written, but its tokenizer does not open: {error}") from error


def _open_directory(report: ExportReport) -> PreTrainedModel:
    return _open_completely(report.path, config=read_model_config(report.path))


def _open_gguf(report: ExportReport) -> PreTrainedModel:
    directory, name = report.path.parent, report.path.name
    config = AutoConfig.from_pretrained(directory, gguf_file=name, local_files_only=True, trust_remote_code=False)
    for setting, value in report.unread_settings.items():
        setattr(config, setting, value)
    return _open_completely(directory, gguf_file=name, config=config)


def _open_completely(path: Path, config: Any, **options: Any) -> PreTrainedModel:
    """A model whose tensors all come from the files: transformers makes up what is missing."""
    auto_class = auto_class_of(config)
    with TRANSFORMERS_LOCK:
        opened: Any = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    model, info = opened
    amiss = {what: sorted(map(str, names)) for what, names in info.items() if names and what != "unexpected_keys"}
    if amiss:
        raise ValueError(f"tensors are amiss: {amiss}")
    return model


def _open_dense(report: ExportReport) -> PreTrainedModel:
    return open_dense(report.path)


def _open_hqq(report: ExportReport) -> PreTrainedModel:
    from hqq.models.hf.base import AutoHQQHFModel

    # hqq opens the configuration without saying that code in it is not to be run, and transformers would ask then
    AutoConfig.from_pretrained(report.path, local_files_only=True, trust_remote_code=False)

    class QuietLoader(AutoHQQHFModel):
        """hqq's loader without its progress bars."""

        @classmethod
        def patch_model(cls, *arguments: Any) -> None:
            super().patch_model(*arguments, verbose=False)

    return QuietLoader.from_quantized(str(report.path), compute_dtype=torch.float32, device="cpu", cache_dir=None)


_OPENERS: Mapping[str, Callable[[ExportReport], PreTrainedModel]] = {
    "hqq": _open_hqq,
    "gguf": _open_gguf,
    "compressed-tensors": _open_dense,
    "gptq": _open_dense,
    "auto-round": _open_dense,
    "awq": _open_dense,
}
"""Formats that are not opened as a plain directory of transformers."""
