"""Quantizers: how the codes of a weight matrix are found.

Those that look at weights alone fit a grid, and every weight takes its nearest code. Calibrated ones look at second
moments of the matrix's inputs as well, and may choose other codes.

A new quantizer is one class in a file of its own and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from lmq.errors import InputError, unknown_name
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.spec import QuantSpec
from lmq.quantizers.fisher_gptq import FisherGptq
from lmq.quantizers.gptq import Gptq
from lmq.quantizers.hqq import Hqq
from lmq.quantizers.hqq_default import HqqDefault
from lmq.quantizers.hqq_package import HqqPackage
from lmq.quantizers.integer_zeros import IntegerZeros
from lmq.quantizers.rtn import RoundToNearest
from lmq.quantizers.weighted import Weighted


class _Quantizer(Protocol):
    """`name` and `describe()` identify a quantizer in tables, checkpoints and cache keys."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def axis(self) -> int:
        """1: groups run along in_features; 0: along out_features, as in the papers."""
        ...

    @property
    def integer_zeros(self) -> IntegerZeros:
        """Whether zeros are whole numbers from 0 to 2^bits - 1, 128 at 8 bits, and are stored as they are.

        "middle": all of them 2^(bits - 1).
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Every option that changes the result, JSON-ready."""
        ...


class WeightQuantizer(_Quantizer, Protocol):
    """Looks at the weights alone: fits a grid, on which every weight takes its nearest code."""

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups] of `weight` [out_features, in_features], before they are stored in 8 bits."""
        ...


@runtime_checkable
class CalibratedQuantizer(_Quantizer, Protocol):
    """Looks at second moments of the inputs too; `lmq.measurement.quantizer_moments` measures them."""

    @property
    def fisher_weighted(self) -> bool:
        """Whether the second moments are those weighted by the gradients, or plain ones."""
        ...

    def quantize(
        self, weights: torch.Tensor, moments: torch.Tensor, menu: Sequence[QuantSpec]
    ) -> list[dict[QuantSpec, EncodedMatrix]]:
        """Every matrix in every configuration, with its codes where these are not the nearest ones.

        `weights` [matrices, out_features, in_features], `moments` [matrices, in_features, in_features] of their inputs.
        """
        ...


Quantizer = WeightQuantizer | CalibratedQuantizer

QUANTIZERS: Mapping[str, type[Quantizer]] = {
    "hqq": Hqq,
    "hqq-default": HqqDefault,
    "rtn": RoundToNearest,
    "weighted": Weighted,
    "gptq": Gptq,
    "fisher-gptq": FisherGptq,
    "hqq-package": HqqPackage,
}

CALIBRATED = tuple(name for name, each in QUANTIZERS.items() if hasattr(each, "quantize"))
"""Names of those that look at second moments; they find codes of GGUF's types too."""


def quantizer(name: str, **options: Any) -> Quantizer:
    """The quantizer of that name. Raises InputError for an unknown name or option."""
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, QUANTIZERS)
    try:
        return QUANTIZERS[name](**options)
    except TypeError as error:
        raise InputError(f"quantizer {name!r} does not take these options: {options}; {error}") from error
