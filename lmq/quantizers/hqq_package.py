"""The hqq library itself as a quantizer: the slow reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from lmq.formats.groups import require_axis
from lmq.formats.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class HqqPackage:
    """`hqq.core.quantize.Quantizer` on the device of the weight; hqq iterates in float16 on CUDA, float32 on CPU."""

    name: ClassVar[str] = "hqq-package"
    integer_zeros: ClassVar[bool] = False
    axis: int = 1
    optimize: bool = True
    round_zero: bool = False

    def __post_init__(self) -> None:
        require_axis(self.axis)

    def fit(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero float32 [groups]."""
        from hqq.core.quantize import Quantizer as PackageQuantizer

        _, meta = PackageQuantizer.quantize(
            weight.detach(),
            nbits=spec.bits,
            group_size=spec.group_size,
            optimize=self.optimize,
            round_zero=self.round_zero,
            axis=self.axis,
            bitpack=False,
            device=str(weight.device),
        )
        return meta["scale"].to(torch.float32).reshape(-1), meta["zero"].to(torch.float32).reshape(-1)

    def describe(self) -> dict[str, Any]:
        """Options and the version of the library as JSON."""
        from importlib.metadata import version

        return {"name": self.name, **asdict(self), "hqq_version": version("hqq")}
