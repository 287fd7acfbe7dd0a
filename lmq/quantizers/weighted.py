"""Round to nearest on grids weighted by the diagonal of the Fisher-weighted second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.groups import require_axis
from lmq.formats.spec import QuantSpec
from lmq.quantizers.calibrated import fitted_grid, gguf_types_of
from lmq.quantizers.gguf_fit import nearest_matrix
from lmq.quantizers.integer_zeros import IntegerZeros, require_integer_zeros


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Scale and zero of least Σ_i H_ii (w_i − ŵ_i)², nearest codes; H as `lmq.quantizers.fisher_gptq` has it."""

    name: ClassVar[str] = "weighted"
    fisher_weighted: ClassVar[bool] = True
    axis: int = 1
    integer_zeros: IntegerZeros = False

    def __post_init__(self) -> None:
        require_axis(self.axis)
        require_integer_zeros(self.integer_zeros)

    def quantize(
        self, weights: Tensor, moments: Tensor, menu: Sequence[QuantSpec]
    ) -> list[dict[QuantSpec, EncodedMatrix]]:
        """The grid of every matrix for every configuration.

        `weights` [matrices, out_features, in_features], `moments` [matrices, in_features, in_features].
        """
        types = gguf_types_of(menu, weights.shape[2], self.axis)
        found: list[dict[QuantSpec, EncodedMatrix]] = []
        for weight, matrix in zip(weights, moments, strict=True):
            importance = matrix.diagonal()
            by_spec: dict[QuantSpec, EncodedMatrix] = {
                spec: fitted_grid(weight, importance, spec, self.axis, integer_zeros=self.integer_zeros)
                for spec in menu
                if spec.gguf is None
            }
            for kind, specs in types.items():
                by_spec |= dict.fromkeys(specs, nearest_matrix(weight, importance, kind))
            found.append({spec: by_spec[spec] for spec in menu})
        return found

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
