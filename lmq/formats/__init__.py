"""How a weight matrix is stored: configurations, groups with their grids, packing, and products with packed weights.

Checkpoints hold grids in groups, or types of GGUF: a `QuantSpec` says how many bits and weights per group, or which
type, and a quantizer finds scale and zero of each group. `FORMATS` are the others. They round a matrix by themselves
and are compared with the grids, as baselines and in studies of sensitivity; no checkpoint holds them. A new one is a
class in a file of its own and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from lmq.errors import unknown_name
from lmq.formats.nf4 import NormalFloat4


class Format(Protocol):
    """Rounds weights to codes of `bits` bits in groups of `group_size`; made with one of its `group_sizes`."""

    name: ClassVar[str]
    bits: ClassVar[int]
    group_sizes: ClassVar[tuple[int, ...]]

    def __init__(self, *, group_size: int = 64) -> None: ...

    @property
    def group_size(self) -> int:
        """Weights that share what the format stores once per group."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: the codes and what is stored once per group."""
        ...

    def size_bytes(self, parameters: int) -> int:
        """Bytes of a matrix of `parameters` weights."""
        ...

    def round_trip(self, weight: Tensor) -> Tensor:
        """The quantized weight, float32 [out_features, in_features]. Raises InputError where the groups do not fit."""
        ...

    def describe(self) -> dict[str, Any]:
        """Every option that changes the result, JSON-ready."""
        ...


FORMATS: Mapping[str, type[Format]] = {"nf4": NormalFloat4}


def rounding_format(name: str, *, group_size: int = 64) -> Format:
    """The format of this name. Raises InputError for an unknown name or a group size that it does not have."""
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    return FORMATS[name](group_size=group_size)
