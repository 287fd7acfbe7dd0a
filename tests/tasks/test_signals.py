"""Sensitivity by NF4, and exact costs of chosen pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmq.formats.nf4 import NormalFloat4
from lmq.measurement.activation import SENSITIVITY_SCHEMA, part_sensitivities
from lmq.measurement.module_divergence import MODULE_DIVERGENCE_SCHEMA
from lmq.measurement.replay import read_hidden_states
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.tables import read_rows
from lmq_tasks.measure import MEASUREMENT_STAGES
from lmq_tasks.states import HIDDEN_STATES_FILE
from tests.tasks.conftest import LENGTH, MENU, Captured

LAYER = 1


def test_sensitivity_to_nf4_needs_no_grids(
    captured: Captured, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # exact products, whatever the processor is fast at
    monkeypatch.setattr("lmq.measurement.activation.fast_matmul_dtype", lambda _: torch.float32)
    config = {"layer": LAYER, "spec": "b4g32", "quantizer": "nf4"}
    found = captured.run(MEASUREMENT_STAGES["sensitivity"], config, hidden=captured.hidden[LAYER])
    rows = read_rows(captured.path(found, "sensitivity.parquet"), SENSITIVITY_SCHEMA)
    model = StreamedModel.open(tiny_qwen, discover(tiny_qwen, weights_sha256="0"))
    hidden = read_hidden_states(captured.path(captured.hidden[LAYER], HIDDEN_STATES_FILE))
    modules = model.structure.in_layer(LAYER)
    with model.block(LAYER) as block:
        quantized = {
            module.id.kind: NormalFloat4(group_size=32).round_trip(
                block.get_parameter(f"{module.id.kind}.weight").detach()
            )
            for module in modules
        }
        expected = part_sensitivities(block, model.block_inputs(LENGTH)[LAYER], hidden, modules, quantized)
    assert {row["part"]: row["sensitivity"] for row in rows} == pytest.approx(expected)
    assert {(row["bits"], row["group_size"]) for row in rows} == {(4, 32)}


def test_divergence_of_chosen_pairs_is_that_of_all(captured: Captured) -> None:
    inputs = {"grids": captured.grids[LAYER], "hidden": captured.hidden[LAYER], "last": captured.hidden[-1]}
    chosen = [["mlp.down_proj", "b3g64"], ["self_attn.q_proj", "b4g64"]]
    whole, some = (
        read_rows(
            captured.path(
                captured.run(MEASUREMENT_STAGES["divergence"], {"layer": LAYER, "sequences": 2, **what}, **inputs),
                "divergence.parquet",
            ),
            MODULE_DIVERGENCE_SCHEMA,
        )
        for what in ({"specs": MENU}, {"pairs": chosen})
    )
    assert len(whole) == 7 * len(MENU)
    assert [[row["kind"], f"b{row['bits']}g{row['group_size']}"] for row in some] == chosen
    for row in some:
        same = next(r for r in whole if (r["kind"], r["bits"]) == (row["kind"], row["bits"]))
        assert row["divergence"] == pytest.approx(same["divergence"], rel=1e-6)
