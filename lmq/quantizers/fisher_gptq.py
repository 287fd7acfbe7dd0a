"""Error feedback on weighted grids, with second moments weighted by what the loss feels of every token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lmq.quantizers.calibrated import ErrorFeedback


@dataclass(frozen=True, kw_only=True)
class FisherGptq(ErrorFeedback):
    """Error feedback with H = Σ_t w_t x_t x_tᵀ, w_t the mean over outputs of g_t², on grids weighted by diag H.

    g_t are the gradients at the module's outputs of the loss for labels that the model draws. ½ tr(E H Eᵀ) is then the
    token-wise Fisher cost of the error E, up to the mean over outputs: one matrix serves scales, codes and costs.
    """

    name: ClassVar[str] = "fisher-gptq"
    fisher_weighted: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
