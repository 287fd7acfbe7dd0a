"""Float types of an export: their names, and conversion that refuses what a type cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmq.errors import InputError, unknown_name
from lmq.model.tensors import FLOAT_TYPES

DTYPE_NAMES = ("float16", "bfloat16", "float32")


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of `DTYPE_NAMES`. Raises InputError for another name."""
    if name not in DTYPE_NAMES:
        raise unknown_name("dtype", name, DTYPE_NAMES)
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that names `dtype`, under the key that it has, or the one that transformers writes today."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype_name(dtype)}


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """A tensor of 16 or 32-bit floats in `dtype`; any other tensor, or for None, the tensor itself.

    Raises InputError naming a tensor with a value too large for `dtype`.
    """
    if dtype is None or tensor.dtype not in FLOAT_TYPES.values():
        return tensor
    converted = tensor.to(dtype)
    if not bool(converted.isfinite().all()) and bool(tensor.isfinite().all()):
        raise InputError(
            f"{name} holds {float(tensor.abs().max()):g}, which {dtype_name(dtype)} cannot; "
            "export with dtype bfloat16 or float32"
        )
    return converted
