"""A new format: one sign per weight and the mean size of each group, as in XNOR-Net (arXiv 1603.05279)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Binary:
    """Weights become plus or minus the mean of |w| of their group, which is stored in float32."""

    name: ClassVar[str] = "binary"
    bits: ClassVar[int] = 1
    group_sizes: ClassVar[tuple[int, ...]] = (32, 64)
    group_size: int = 64

    @property
    def bits_per_weight(self) -> float:
        """A sign per weight and a float32 number per group."""
        return 1 + 32 / self.group_size

    def size_bytes(self, parameters: int) -> int:
        """Bytes of the signs and the numbers."""
        return parameters // 8 + 4 * (parameters // self.group_size)

    def round_trip(self, weight: Tensor) -> Tensor:
        """The quantized weight, float32 [out_features, in_features]."""
        groups = weight.detach().float().reshape(-1, self.group_size)
        return (groups.sign() * groups.abs().mean(1, keepdim=True)).reshape(weight.shape)

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
