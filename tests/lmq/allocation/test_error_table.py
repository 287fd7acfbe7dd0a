import random
from typing import Any

import numpy as np
import pytest

from lmq.allocation.error_table import ErrorTable
from lmq.errors import InputError
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId

MODULES = tuple(sorted(ModuleId(layer, kind) for layer in range(11) for kind in ("mlp.up_proj", "self_attn.q_proj")))
MENU = STOPS[2:6]


def _row(module: ModuleId, spec: QuantSpec) -> dict[str, Any]:
    return {
        "layer": module.layer,
        "kind": module.kind,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "meta_bits": spec.meta_bits,
        "meta_group_size": spec.meta_group_size,
        "size_bytes": spec.size_bytes(4096),
        "cost": _cost(module, spec),
    }


def _cost(module: ModuleId, spec: QuantSpec) -> float:
    return module.layer + len(module.kind) / 100 + 1 / spec.bits


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [_row(module, spec) for module in MODULES for spec in MENU]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_the_rows_does_not_matter(rows: list[dict[str, Any]], seed: int) -> None:
    random.Random(seed).shuffle(rows)
    table = ErrorTable.from_rows(rows, "cost")
    assert table.modules == MODULES
    assert table.specs == MENU
    assert (table.cost.dtype, table.size_bytes.dtype) == (np.float64, np.int64)
    for row, module in enumerate(MODULES):
        assert table.cost[row].tolist() == [_cost(module, spec) for spec in MENU]
        assert table.size_bytes[row].tolist() == [spec.size_bytes(4096) for spec in MENU]


def test_missing_cells_are_named(rows: list[dict[str, Any]]) -> None:
    del rows[5]
    rows[0]["cost"] = None
    with pytest.raises(InputError) as caught:
        ErrorTable.from_rows(rows, "cost")
    assert str(caught.value) == (
        "the error table has no cost for layer 0 mlp.up_proj at b2g32, layer 0 self_attn.q_proj at b3g128; "
        "measure them and try again"
    )


def test_of_many_missing_cells_some_are_named(rows: list[dict[str, Any]]) -> None:
    for row in rows[:9]:
        row["cost"] = None
    with pytest.raises(InputError, match="at b2g32 and 4 more; measure them"):
        ErrorTable.from_rows(rows, "cost")
