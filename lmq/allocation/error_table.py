"""Error table: what every module loses under every configuration, and what it weighs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Cost and stored size of each module (row) under each configuration (column, by size).

    `cost` float64 [modules, configurations], lower is better; `size_bytes` int64 of the same shape.
    """

    modules: tuple[ModuleId, ...]
    specs: tuple[QuantSpec, ...]
    cost: np.ndarray
    size_bytes: np.ndarray

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], cost_column: str) -> ErrorTable:
        """Build from table rows with layer, kind, the columns of a configuration, size_bytes and `cost_column`.

        The order of the rows does not matter. Raises InputError naming modules or configurations that are missing.
        """
        cells: dict[tuple[ModuleId, QuantSpec], tuple[float, int]] = {}
        for row in rows:
            spec = QuantSpec.from_row(row)
            cells[ModuleId(row["layer"], row["kind"]), spec] = (row[cost_column], row["size_bytes"])
        modules = tuple(sorted({module for module, _ in cells}))
        specs = tuple(sorted({spec for _, spec in cells}, key=lambda spec: (spec.bits_per_weight, spec)))
        missing = [f"{m} at {s}" for m in modules for s in specs if cells.get((m, s), (None, 0))[0] is None]
        if missing:
            raise InputError(f"the error table has no {cost_column} for {_some(missing)}; measure them and try again")
        cost = np.array([[cells[m, s][0] for s in specs] for m in modules], dtype=np.float64)
        size = np.array([[cells[m, s][1] for s in specs] for m in modules], dtype=np.int64)
        return cls(modules, specs, cost, size)


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
