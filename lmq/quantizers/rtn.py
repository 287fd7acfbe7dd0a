"""Round to nearest: the grid that spans each group from its smallest to its largest weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from lmq.formats.groups import require_axis, to_groups
from lmq.formats.spec import QuantSpec
from lmq.quantizers.integer_zeros import IntegerZeros, require_integer_zeros, whole_zeros

_SMALLEST_SPREAD = 1e-30
"""Far below any weight, and far above where the inverse of a scale leaves float32."""


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Min-max grid without iterations: hqq with `optimize=False`.

    `integer_zeros` takes the nearest whole zeros instead (see `lmq.quantizers.integer_zeros`).
    """

    name: ClassVar[str] = "rtn"
    axis: int = 1
    integer_zeros: IntegerZeros = False

    def __post_init__(self) -> None:
        require_axis(self.axis)
        require_integer_zeros(self.integer_zeros)

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups]."""
        groups = to_groups(weight.detach(), spec.group_size, self.axis)
        inverse_scale, zero = min_max_grid(groups, spec.bits)
        scale = 1 / inverse_scale
        if not self.integer_zeros:
            return scale, zero
        return whole_zeros(groups, scale, zero, spec.bits, self.integer_zeros)

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}


def min_max_grid(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse scale and zero float32 [groups] of the grid from the minimum to the maximum of each row.

    A group whose weights are all equal gets scale 1. hqq 0.2.8 does that below a spread of 1e-4, and lets no inverse
    scale exceed 2e4: both cost small weights (a standard deviation of 5e-5 at 3 bits) up to half again their error.
    """
    low, high = groups.amin(1).to(torch.float32), groups.amax(1).to(torch.float32)
    spread = high - low
    inverse_scale = torch.where(spread <= _SMALLEST_SPREAD, 1.0, (2**bits - 1) / spread)
    return inverse_scale, -low * inverse_scale
