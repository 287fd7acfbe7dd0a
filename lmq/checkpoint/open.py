"""Opening of a whole model directory as it is served: plain, of lmq, or quantized by another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lmq import load
from lmq.checkpoint.hf import QUANT_METHOD
from lmq.errors import DamagedFile, InputError, LmqError
from lmq.model.source import nearest_sibling

_METHODS = sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING})
_DOES_NOT_OPEN = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What transformers and the packages it calls raise for files and versions that do not go together."""


def open_model_directory(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dense: bool = False
) -> PreTrainedModel:
    """The model in evaluation mode, by plain `from_pretrained`, in `dtype` (None: as stored).

    With `dense` a checkpoint of lmq is unpacked once: full memory, faster calls. Raises InputError where there is no
    model directory or a package that opens it is missing, DamagedFile for a damaged checkpoint of lmq, and LmqError
    where it does not open for another reason, or not completely.
    """
    method = quantization_method(path)
    if method == QUANT_METHOD:
        return load(path, device=device, dtype=dtype, dense=dense)
    if method is not None and method not in _METHODS:
        raise InputError(
            f"{path} is quantized by {method}, which this transformers does not open; it opens: {', '.join(_METHODS)}"
        )
    try:
        return _open_completely(path, dtype, device)
    except ImportError as error:
        raise InputError(
            f"{path} is quantized by {method}, and a package that opens it is missing: {_first_line(error)}"
        ) from error
    except _DOES_NOT_OPEN as error:
        if method == "compressed-tensors":
            return _open_compressed_tensors(path, dtype, device)
        raise LmqError(f"{path} ({method or 'not quantized'}) does not open: {_first_line(error)}") from error


def quantization_method(path: Path) -> str | None:
    """`quant_method` of a model directory's configuration, None for a plain model. Raises InputError."""
    if not path.is_dir():
        raise InputError(f"there is no model directory {path}{nearest_sibling(path)}")
    try:
        fields = json.loads((path / "config.json").read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no config.json that can be read ({error}); is it a model directory?") from error
    return None if fields is None else str(fields.get("quant_method", "an unnamed method"))


def _open_completely(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> PreTrainedModel:
    """A model whose tensors all come from the files: transformers makes up what is missing."""
    opened: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model, info = opened
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise DamagedFile(f"{path} lacks the tensor {missing[0]} and {len(missing) - 1} more; download it again")
    return model.to(device).eval()


def _open_compressed_tensors(path: Path, dtype: torch.dtype | None, device: torch.device | str) -> PreTrainedModel:
    """What transformers refuses of compressed-tensors (packed zeros), decompressed before it is opened."""
    from lmq.checkpoint.compressed_tensors_reader import open_dense

    try:
        model: Any = open_dense(path, dtype or torch.float32)
    except _DOES_NOT_OPEN as error:
        raise LmqError(f"{path} (compressed-tensors) does not open: {_first_line(error)}") from error
    return model.to(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
