"""A new quantizer: grids that span a multiple of each group's standard deviation around its mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from lmq.formats.groups import require_axis, to_groups
from lmq.formats.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class Deviations:
    """The grid of a group runs from `reach` standard deviations below its mean to as many above."""

    name: ClassVar[str] = "deviations"
    integer_zeros: ClassVar[bool] = False
    axis: int = 1
    reach: float = 2.5

    def __post_init__(self) -> None:
        require_axis(self.axis)

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups]."""
        groups = to_groups(weight.detach(), spec.group_size, self.axis).float()
        spread = 2 * self.reach * groups.std(1).clamp(min=1e-30)
        scale = spread / (2**spec.bits - 1)
        return scale, -(groups.mean(1) - spread / 2) / scale

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
