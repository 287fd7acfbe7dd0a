"""NormalFloat 4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314): another quantizer to compare sensitivities with.

Every `group_size` consecutive weights of the flattened matrix are divided by their largest size and rounded to the
nearest of 16 levels, quantiles of the normal distribution scaled to -1 … 1: what bitsandbytes does. The divisors stay
float32 (no double quantization). It is measured only: checkpoints hold no such weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.formats.groups import group_blocks

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The published code book, QLoRA appendix E."""


@dataclass(frozen=True, kw_only=True)
class NormalFloat4:
    """Rounds weights to 4-bit NormalFloat in groups along in_features; 64 is what QLoRA and bitsandbytes use."""

    name: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4
    group_sizes: ClassVar[tuple[int, ...]] = (32, 64, 128)
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size not in self.group_sizes:
            raise InputError(f"group_size = {self.group_size} is not allowed for nf4; allowed: {self.group_sizes}")

    @property
    def bits_per_weight(self) -> float:
        """4-bit codes and a float32 divisor per group: 4.5 for groups of 64."""
        return self.bits + 32 / self.group_size

    def size_bytes(self, parameters: int) -> int:
        """Bytes of the codes and divisors of a matrix of `parameters` weights."""
        return parameters * self.bits // 8 + 4 * -(-parameters // self.group_size)

    def round_trip(self, weight: Tensor) -> Tensor:
        """The quantized weight, float32 [out_features, in_features]; groups straddle rows as in bitsandbytes.

        A weight midway between two levels takes the lower one. Raises InputError where the group size does not
        divide the number of weights.
        """
        if weight.numel() % self.group_size:
            raise InputError(
                f"nf4 in groups of {self.group_size} does not fit a matrix of {weight.numel():,} weights; "
                f"choose a group size of {self.group_sizes} that divides their number"
            )
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        midpoints = (levels[1:] + levels[:-1]) / 2
        groups = weight.detach().reshape(-1, self.group_size)
        quantized = torch.empty(groups.shape, device=weight.device)
        for block in group_blocks(groups):
            values = groups[block].to(torch.float32)
            divisor = values.abs().amax(1, keepdim=True)
            normalised = values / torch.where(divisor > 0, divisor, 1)
            quantized[block] = levels[torch.bucketize(normalised, midpoints)] * divisor
        return quantized.reshape(weight.shape)

    def describe(self) -> dict[str, Any]:
        """Options as JSON."""
        return {"name": self.name, **asdict(self)}
