"""Budgets and sizes: bits per weight, bytes, or a share over a uniform allocation, all resolved to bytes.

The bytes are those of the quantized modules. A matrix stored as `b4g64` takes 4.2539 bits per weight and a
12-byte header, so a budget of `4.25 bpw` does not hold `uniform b4g64`: ask for `uniform b4g64` by name.

There are two storage layouts: `paper`, ours, and `hqq`, of the hqq library. `paper` packs the codes densely and keeps
scales and zeros in 8 bits (`lmq.formats.spec`, MXQ equation 2). hqq 0.2.8 keeps them in 16 bits and packs ten 3-bit
codes into an int32, so that a model which MXQ calls 3.13 bits per weight is one of 3.45 bits as hqq stores it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self, get_args

import numpy as np

from lmq.allocation.solver import check_budget
from lmq.allocation.targets import Target
from lmq.errors import InputError, unknown_name
from lmq.formats.groups import require_axis
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModelStructure, ModuleInfo

UNIT_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
MOST_BITS_PER_WEIGHT = 32
ALLOWED_FORMS = (
    "bits per weight as 4.25 or '4.25 bpw', bytes as '80000000 B', '80 MB', '1.2 GB' or '1.1 GiB', "
    "a uniform allocation as 'uniform b4g64' or 'uniform b3g64 + 2%'"
)
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"

Layout = Literal["paper", "hqq"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

HQQ_SCALE_BYTES = 2
"""hqq keeps scales and zeros in its compute type, float16 unless another is asked for."""
_CODES_PER_INT32 = 10


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large the quantized modules may be; exactly one of the three fields is set.

    `bits_per_weight` over the quantized modules; `size_bytes` of all of them; `uniform`, the size of every module in
    this configuration, plus `percent_over` percent.
    """

    bits_per_weight: Fraction | None = None
    size_bytes: int | None = None
    uniform: QuantSpec | None = None
    percent_over: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        given = [self.bits_per_weight is not None, self.size_bytes is not None, self.uniform is not None]
        if sum(given) != 1:
            raise InputError("a budget is one of bits_per_weight, size_bytes or uniform")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= MOST_BITS_PER_WEIGHT:
            raise InputError(
                f"{float(self.bits_per_weight):g} bits per weight is not between 0 and {MOST_BITS_PER_WEIGHT}; "
                "for a number of bytes write the unit, as in '80000000 B' or '80 MB'"
            )
        if self.size_bytes is not None and self.size_bytes <= 0:
            raise InputError(f"a budget of {self.size_bytes} bytes is not positive")
        if self.percent_over < 0 or (self.percent_over and self.uniform is None):
            raise InputError("a percentage goes over a uniform allocation, as in 'uniform b3g64 + 2%'")

    @classmethod
    def parse(cls, value: str | int | float | Fraction) -> Budget:
        """Read a budget from a configuration file or the command line. Raises InputError naming the allowed forms."""
        text = str(value).strip()
        if match := re.fullmatch(rf"{_NUMBER}\s*(?:bpw)?", text, re.IGNORECASE):
            return cls(bits_per_weight=Fraction(match[1]))
        if (match := re.fullmatch(rf"{_NUMBER}\s*([KMGT]?i?B)", text, re.IGNORECASE)) is not None:
            return cls(size_bytes=math.floor(Fraction(match[1]) * UNIT_BYTES[match[2].upper()]))
        if match := re.fullmatch(
            rf"uniform\s+(b\d+g\d+|i?q\d_\w+|(?:mx|nv)fp4)(?:\s*\+\s*{_NUMBER}\s*%)?", text, re.IGNORECASE
        ):
            return cls(uniform=QuantSpec.parse(match[1].lower()), percent_over=Fraction(match[2] or 0))
        raise InputError(f"{value!r} is not a budget; allowed: {ALLOWED_FORMS}")

    def __str__(self) -> str:
        if self.bits_per_weight is not None:
            return f"{_decimal(self.bits_per_weight)} bpw"
        if self.uniform is not None:
            over = f" + {_decimal(self.percent_over)}%" if self.percent_over else ""
            return f"uniform {self.uniform.name}{over}"
        return f"{self.size_bytes} B"

    def resolve(self, structure: ModelStructure, target: Target | None = None) -> int:
        """Bytes that the quantized modules of this model may take, in a target's file; part of a byte is dropped.

        Raises InputError if the uniform configuration does not fit one of the modules.
        """
        if self.bits_per_weight is not None:
            return math.floor(structure.parameters * self.bits_per_weight / 8)
        if self.uniform is not None:
            uniform_bytes = int(module_sizes(structure.quantized, [self.uniform], target).sum())
            return math.floor(uniform_bytes * (1 + self.percent_over / 100))
        assert self.size_bytes is not None
        return self.size_bytes


def module_sizes(modules: Sequence[ModuleInfo], menu: Sequence[QuantSpec], target: Target | None = None) -> np.ndarray:
    """Return the stored size in bytes int64 [modules, configurations], in our checkpoint or in a target's file.

    Raises InputError for an empty or repeating menu, no modules, or a configuration that does not fit a module.
    """
    if not modules:
        raise InputError("there are no modules to allocate; the model has no weight matrix that can be quantized")
    if not menu or len(set(menu)) != len(menu):
        names = ", ".join(spec.name for spec in menu) or "nothing"
        raise InputError(f"the menu holds {names}; it needs at least one configuration and none twice")
    of_shape = {}
    for module in modules:
        if (shape := (module.out_features, module.in_features)) not in of_shape:
            of_shape[shape] = [_size_bytes(module, spec, target) for spec in menu]
    return np.array([of_shape[module.out_features, module.in_features] for module in modules], dtype=np.int64)


def feasible_range(structure: ModelStructure, menu: Sequence[QuantSpec]) -> tuple[int, int]:
    """Smallest and largest size in bytes that any allocation from the menu has."""
    sizes = module_sizes(structure.quantized, menu)
    return int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())


def check_feasible(
    budget_bytes: int,
    structure: ModelStructure,
    menu: Sequence[QuantSpec],
    *,
    target: Target | None = None,
    what: str = "the budget",
) -> None:
    """Raise InfeasibleBudget naming `what` if no allocation from the menu fits.

    Raises InputError if a configuration does not fit a module.
    """
    check_budget(budget_bytes, module_sizes(structure.quantized, menu, target), what=what)


def hqq_size_bytes(parameters: int, spec: QuantSpec, *, axis: int = 1) -> int:
    """Bytes of the codes, scales and zeros that hqq 0.2.8 keeps of a matrix of `parameters` weights.

    hqq packs a table of codes along its rows: [groups, group_size] for `axis` 1 (groups along in_features),
    [group_size, groups] for 0. 8-, 4- and 2-bit codes go 1, 2 and 4 to a byte; 3-bit codes 10 to an int32, the rows
    padded to a multiple of 10. The tens of bytes that describe a matrix (shape, types) are not counted.
    Raises InputError where groups do not divide the matrix or their number is one that hqq cannot pack.
    """
    require_axis(axis)
    if spec.gguf is not None:
        raise InputError(f"{spec.name} is a type that hqq does not hold")
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
    def of(
        cls,
        modules: Sequence[ModuleInfo],
        menu: Sequence[QuantSpec],
        layout: Layout,
        *,
        axis: int = 1,
        target: Target | None = None,
    ) -> Self:
        """Range of the configurations that fit every module; with a `target`, in its file, whatever the layout.

        Raises InputError where none does.
        """
        fitting = [spec for spec in menu if _fits(modules, spec, layout, axis)]
        if not fitting:
            names = ", ".join(spec.name for spec in menu) or "nothing"
            raise InputError(f"of the menu {names} no configuration fits every module in the {layout} layout")
        if target is None:
            sizes = layout_sizes(modules, fitting, layout, axis=axis)
        else:
            sizes = module_sizes(modules, fitting, target)
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


def _size_bytes(module: ModuleInfo, spec: QuantSpec, target: Target | None) -> int:
    try:
        if target is not None:
            return target.size_bytes(spec, module.out_features, module.in_features)
        return spec.size_bytes(module.parameters, module.in_features)
    except InputError as error:
        raise InputError(f"{module.id}: {error}") from error


def _decimal(value: Fraction) -> str:
    return f"{float(value):.12g}"


def _hqq_size(module: ModuleInfo, spec: QuantSpec, axis: int) -> int:
    try:
        return hqq_size_bytes(module.parameters, spec, axis=axis)
    except InputError as error:
        raise InputError(f"{module.id}: {error}") from error


def _fits(modules: Sequence[ModuleInfo], spec: QuantSpec, layout: Layout, axis: int) -> bool:
    try:
        layout_sizes(modules, [spec], layout, axis=axis)
    except InputError:
        return False
    return True
