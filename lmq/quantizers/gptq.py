"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): error feedback with plain second moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lmq.quantizers.calibrated import ErrorFeedback


@dataclass(frozen=True, kw_only=True)
class Gptq(ErrorFeedback):
    """Error feedback with H = Σ_t x_t x_tᵀ on grids of least squared error.

    Unlike GPTQ's program the inputs are those of the full-precision model, grids are fitted before any rounding (to
    least squared error, not to the range), and columns go in descending H_jj without moving the groups.
    """

    name: ClassVar[str] = "gptq"
    fisher_weighted: ClassVar[bool] = False
    weighted_grid: bool = False

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
