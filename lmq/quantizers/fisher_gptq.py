"""Error feedback and coordinate descent on weighted grids, with second moments weighted by what the loss feels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lmq.quantizers.calibrated import ErrorFeedback


@dataclass(frozen=True, kw_only=True)
class FisherGptq(ErrorFeedback):
    """Error feedback with H = Σ_t w_t x_t x_tᵀ, w_t the mean over outputs of g_t², on grids weighted by diag H.

    g_t are the gradients at the module's outputs of the loss for labels that the model draws. ½ tr(E H Eᵀ) is then the
    token-wise Fisher cost of the error E, up to the mean over outputs: one matrix serves scales, codes and costs.

    Sweeps of coordinate descent follow. `damping` is larger than GPTQ's 0.01: what is gained on the calibration text
    beyond that is lost on other text (docs/decisions/0009-calibrated-codes.md).
    """

    name: ClassVar[str] = "fisher-gptq"
    fisher_weighted: ClassVar[bool] = True
    damping: float = 0.2
    sweeps: int = 2

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
