"""What a quantized matrix takes in bytes in each storage layout: `paper`, ours, and `hqq`, of the hqq library.

`paper` packs the codes densely and keeps scales and zeros in 8 bits (`lmq.formats.spec`, MXQ equation 2). hqq 0.2.8
keeps them in 16 bits and packs ten 3-bit codes into an int32, so that a model which MXQ calls 3.13 bits per weight
is one of 3.45 bits as hqq stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np

from lmq.allocation.budget import module_sizes
from lmq.errors import InputError, unknown_name
from lmq.formats.groups import require_axis
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleInfo

Layout = Literal["paper", "hqq"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

HQQ_SCALE_BYTES = 2
"""hqq keeps scales and zeros in its compute type, float16 unless another is asked for."""
_CODES_PER_INT32 = 10


def hqq_size_bytes(parameters: int, spec: QuantSpec, *, axis: int = 1) -> int:
    """Bytes of the codes, scales and zeros that hqq 0.2.8 keeps of a matrix of `parameters` weights.

    hqq packs a table of codes along its rows: [groups, group_size] for `axis` 1 (groups along in_features),
    [group_size, groups] for 0. 8-, 4- and 2-bit codes go 1, 2 and 4 to a byte; 3-bit codes 10 to an int32, the rows
    padded to a multiple of 10. The tens of bytes that describe a matrix (shape, types) are not counted.
    Raises InputError where groups do not divide the matrix or their number is one that hqq cannot pack.
    """
    require_axis(axis)
    groups = spec.groups(parameters)
    rows, columns = (groups, spec.group_size) if axis == 1 else (spec.group_size, groups)
    if spec.bits == 3:
        codes_bytes = 4 * -(-rows // _CODES_PER_INT32) * columns
    else:
        codes_per_byte = 8 // spec.bits
        if rows % codes_per_byte:
            raise InputError(
                f"hqq cannot pack {spec.name} of a matrix of {parameters:,} weights: its {rows:,} groups are not a "
                f"multiple of {codes_per_byte}; take {spec.name} out of the menu, or keep to the paper layout"
            )
        codes_bytes = rows // codes_per_byte * columns
    return codes_bytes + 2 * groups * HQQ_SCALE_BYTES


def layout_sizes(
    modules: Sequence[ModuleInfo], menu: Sequence[QuantSpec], layout: Layout, *, axis: int = 1
) -> np.ndarray:
    """Stored size in bytes int64 [modules, configurations] in a layout; `axis` matters to `hqq` alone.

    Raises InputError for an unknown layout, an empty menu, or naming the module that a configuration does not fit.
    """
    if layout not in LAYOUTS:
        raise unknown_name("storage layout", layout, LAYOUTS)
    paper_sizes = module_sizes(modules, menu)
    if layout == "paper":
        return paper_sizes
    return np.array([[_hqq_size(module, spec, axis) for spec in menu] for module in modules], dtype=np.int64)


def _hqq_size(module: ModuleInfo, spec: QuantSpec, axis: int) -> int:
    try:
        return hqq_size_bytes(module.parameters, spec, axis=axis)
    except InputError as error:
        raise InputError(f"{module.id}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LayoutRange:
    """What a model's quantized modules can take in one layout.

    `uniform_bytes` is the size with one configuration everywhere, for those of the menu that fit every module, by
    size; `smallest_bytes` and `largest_bytes` of any allocation from them.
    """

    layout: Layout
    uniform_bytes: Mapping[QuantSpec, int]
    smallest_bytes: int
    largest_bytes: int

    @classmethod
    def of(cls, modules: Sequence[ModuleInfo], menu: Sequence[QuantSpec], layout: Layout, *, axis: int = 1) -> Self:
        """Range of the configurations that fit every module. Raises InputError where none does."""
        fitting = [spec for spec in menu if _fits(modules, spec, layout, axis)]
        if not fitting:
            names = ", ".join(spec.name for spec in menu) or "nothing"
            raise InputError(f"of the menu {names} no configuration fits every module in the {layout} layout")
        sizes = layout_sizes(modules, fitting, layout, axis=axis)
        totals = zip(fitting, sizes.sum(axis=0).tolist(), strict=True)
        return cls(
            layout=layout,
            uniform_bytes=dict(sorted(totals, key=lambda item: item[1])),
            smallest_bytes=int(sizes.min(axis=1).sum()),
            largest_bytes=int(sizes.max(axis=1).sum()),
        )

    def uniform_around(self, budget_bytes: int) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The largest uniform configuration within the budget, and the smallest one over it."""
        within = [spec for spec, size in self.uniform_bytes.items() if size <= budget_bytes]
        over = [spec for spec, size in self.uniform_bytes.items() if size > budget_bytes]
        return within[-1] if within else None, over[0] if over else None


def _fits(modules: Sequence[ModuleInfo], spec: QuantSpec, layout: Layout, axis: int) -> bool:
    try:
        layout_sizes(modules, [spec], layout, axis=axis)
    except InputError:
        return False
    return True
