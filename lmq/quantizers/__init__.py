"""Quantizers: how the scale and zero of every group of a weight matrix are fitted.

A new quantizer is one class in a file of its own and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lmq.errors import InputError, unknown_name
from lmq.formats.spec import QuantSpec
from lmq.quantizers.hqq import Hqq
from lmq.quantizers.hqq_package import HqqPackage
from lmq.quantizers.rtn import RoundToNearest


class Quantizer(Protocol):
    """Fits the grid of a matrix; `name` and `describe()` identify it in tables, checkpoints and cache keys."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def axis(self) -> int:
        """1: groups run along in_features; 0: along out_features, as in the papers."""
        ...

    @property
    def integer_zeros(self) -> bool:
        """Whether zeros are whole numbers from 0 to 2^bits - 1, 128 at 8 bits, and are stored as they are."""
        ...

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups] of `weight` [out_features, in_features], before they are stored in 8 bits."""
        ...

    def describe(self) -> dict[str, Any]:
        """Every option that changes the result, JSON-ready."""
        ...


QUANTIZERS: Mapping[str, type[Quantizer]] = {"hqq": Hqq, "rtn": RoundToNearest, "hqq-package": HqqPackage}


def quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer of that name. Raises InputError for an unknown name or option."""
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, QUANTIZERS)
    try:
        return QUANTIZERS[name](**options)
    except TypeError as error:
        raise InputError(f"quantizer {name!r} does not take these options: {options}; {error}") from error
