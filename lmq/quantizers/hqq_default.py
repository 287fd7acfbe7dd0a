"""hqq as its package is configured by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmq.quantizers.hqq import Hqq


@dataclass(frozen=True, kw_only=True)
class HqqDefault(Hqq):
    """What `HQQLinear` with `BaseQuantizeConfig(nbits)` of hqq 0.2.8 does; differs from `hqq` at 4 bits alone."""

    name: ClassVar[str] = "hqq-default"
    round_zero: bool = True
