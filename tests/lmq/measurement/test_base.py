"""A layer as measurements see it, and what a measurement's value says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmq.errors import LmqError
from lmq.formats.spec import QuantSpec
from lmq.measurement.base import LayerReplay, Need
from lmq.measurement.grids import fit_grids
from lmq.measurement.registry import COSTS, MEASUREMENTS
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.quantizers import quantizer

MENU = (QuantSpec.parse("b3g64"), QuantSpec.parse("b4g64"))


@pytest.fixture
def layer(tiny_qwen: Path) -> LayerReplay:
    structure = discover(tiny_qwen, weights_sha256="0")
    weights = load_layer_weights(tiny_qwen, structure, 1)
    grids = {module.id: fit_grids(weights[module.id.kind], MENU, quantizer("rtn")) for module in structure.in_layer(1)}
    return LayerReplay(
        structure,
        1,
        device=torch.device("cpu"),
        settings={"menu": [spec.name for spec in MENU]},
        open_model=lambda: StreamedModel.open(tiny_qwen, structure),
        read_weights=lambda: weights,
        inputs={Need.GRIDS: lambda: grids},
    )


def test_errors_are_what_the_grids_change(layer: LayerReplay) -> None:
    with layer:
        for module in layer.modules:
            weight = layer.stored_weights()[module.id.kind]
            found = dict(layer.errors(module))
            assert tuple(found) == MENU
            for spec, error in found.items():
                assert torch.equal(error, layer.grids[module.id][spec].round_trip(weight) - weight)


def test_the_block_is_released_with_the_layer(layer: LayerReplay) -> None:
    with layer:
        block = layer.block
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())


def test_an_input_that_was_not_asked_for_is_named(layer: LayerReplay) -> None:
    with layer, pytest.raises(LmqError, match=r"layer 1 was given no hidden; name Need\.STATES"):
        _ = layer.hidden


def test_names_of_measurements_and_costs_are_told_apart() -> None:
    columns = [column.name for cost in COSTS.values() for column in cost.columns]
    assert len(columns) == len(set(columns))
    assert len({measurement.schema.name for measurement in MEASUREMENTS.values()}) == len(MEASUREMENTS)
    for cost in COSTS.values():
        assert {column.column for column in cost.columns} <= set(cost.schema.columns.names)
