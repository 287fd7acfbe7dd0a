"""Opening of exports as their users open them, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmq.errors import InputError, LmqError
from lmq.export.compressed_tensors_reader import open_dense

_DOES_NOT_OPEN = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What loaders raise for files that are not what they expect."""


def open_export(path: Path, format_name: str) -> PreTrainedModel:
    """The model of an export, for evaluation.

    Raises LmqError where it does not open, or not completely, InputError where the package that opens it is missing.
    """
    try:
        return _OPENERS[format_name](path).eval()
    except ImportError as error:
        raise InputError(
            f"{path} is written; the check needs a package that is missing: {error}. "
            "Install it, as with `pip install 'lmq[vllm]'`, or export without the check"
        ) from error
    except _DOES_NOT_OPEN as error:
        raise LmqError(f"{path} is written, but does not open as {format_name}: {error}") from error


def _open_directory(path: Path) -> PreTrainedModel:
    return _open_completely(path)


def _open_gguf(path: Path) -> PreTrainedModel:
    return _open_completely(path.parent, gguf_file=path.name)


def _open_completely(path: Path, **options: str) -> PreTrainedModel:
    """A model whose tensors all come from the files: transformers makes up what is missing."""
    opened: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
    )
    model, info = opened
    if amiss := {what: sorted(map(str, names)) for what, names in info.items() if names}:
        raise ValueError(f"tensors are amiss: {amiss}")
    return model


def _open_hqq(path: Path) -> PreTrainedModel:
    from hqq.models.hf.base import AutoHQQHFModel

    class QuietLoader(AutoHQQHFModel):
        """hqq's loader without its progress bars."""

        @classmethod
        def patch_model(cls, *arguments: Any) -> None:
            super().patch_model(*arguments, verbose=False)

    return QuietLoader.from_quantized(str(path), compute_dtype=torch.float32, device="cpu", cache_dir=None)


_OPENERS: Mapping[str, Callable[[Path], PreTrainedModel]] = {
    "safetensors": _open_directory,
    "hqq": _open_hqq,
    "gguf": _open_gguf,
    "compressed-tensors": open_dense,
}
