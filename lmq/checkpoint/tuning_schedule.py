"""What learned rounding and polish are told alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmq.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TuningSchedule:
    """`steps` in all, of `sequences_per_step` each; with `integer_zeros` zeros stay as they are.

    Raises InputError for fewer than one of either.
    """

    what: ClassVar[str]
    """The name of what is done, as errors have it."""

    steps: int = 60
    sequences_per_step: int = 2
    integer_zeros: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "sequences_per_step"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} of {self.what} is not allowed; give 1 or more")

    def sequences_of(self, step: int, available: int) -> Tensor:
        """Which of `available` sequences a step sees, int64 [sequences_per_step]: all of them in turn."""
        return torch.arange(step * self.sequences_per_step, (step + 1) * self.sequences_per_step) % available
