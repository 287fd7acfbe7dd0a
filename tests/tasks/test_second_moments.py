"""Errors of single modules: what the stage writes, against the block replayed in float64."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.second_moments import MODULE_ERRORS_SCHEMA
from lmq.measurement.traces import ModuleTrace, trace_modules
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModuleId
from lmq.tables import read_rows
from lmq_tasks.measure import GRIDS_FILE, MEASUREMENT_STAGES
from lmq_tasks.states import GRADIENTS_FILE, HIDDEN_STATES_FILE
from tests.tasks.conftest import LENGTH, MENU, SEQUENCES, Captured

LAYER = 2
TOKENS = SEQUENCES * LENGTH


def replayed(captured: Captured, model_dir: Path) -> tuple[dict[str, ModuleTrace], dict[str, Tensor]]:
    """Traces of the layer's modules, and their weights."""
    model = StreamedModel.open(model_dir, discover(model_dir, weights_sha256="0"))
    hidden = read_hidden_states(captured.path(captured.hidden[LAYER], HIDDEN_STATES_FILE))
    gradient = read_gradients(captured.path(captured.gradient[LAYER], GRADIENTS_FILE))
    kinds = [module.id.kind for module in model.structure.in_layer(LAYER)]
    with model.block(LAYER) as block:
        inputs = model.block_inputs(LENGTH)[LAYER]
        weights = {kind: block.get_parameter(f"{kind}.weight").detach().clone() for kind in kinds}
        return trace_modules(block, inputs, hidden, gradient, kinds, torch.float32), weights


def test_costs_are_those_of_the_block_replayed(captured: Captured, tiny_qwen: Path) -> None:
    found = captured.run(
        MEASUREMENT_STAGES["module_errors"],
        {"layer": LAYER, "menu": MENU},
        grids=captured.grids[LAYER],
        hidden=captured.hidden[LAYER],
        text_gradients=captured.gradient[LAYER],
    )
    rows = read_rows(captured.path(found, "module-errors.parquet"), MODULE_ERRORS_SCHEMA)
    traces, weights = replayed(captured, tiny_qwen)
    grids = load_grids(captured.path(captured.grids[LAYER], GRIDS_FILE))
    assert len(rows) == len(weights) * len(MENU)
    for row in rows:
        kind = row["kind"]
        grid = grids[ModuleId(LAYER, kind)][QuantSpec(row["bits"], row["group_size"])]
        error = (grid.round_trip(weights[kind]) - weights[kind]).double()
        inputs, gradients = traces[kind].inputs.double(), traces[kind].gradients.double()
        change = inputs @ error.t()
        assert row["tokens"] == TOKENS
        assert row["in_features"] == error.shape[1]
        assert row["input_error"] == pytest.approx(float(change.square().mean()), rel=1e-4)
        by_output = change.square().mean(dim=0) @ gradients.square().mean(dim=0)
        assert row["fisher_diagonal"] == pytest.approx(TOKENS * float(by_output), rel=1e-4)
        token_weights = gradients.square().sum(dim=1) / gradients.square().sum(dim=1).mean()
        weighted = (change.square() * token_weights[:, None]).mean(dim=0) @ gradients.square().mean(dim=0)
        assert row["fisher_weighted"] == pytest.approx(TOKENS * float(weighted), rel=1e-4)
        assert row["delta_loss"] == pytest.approx(abs(float((gradients * change).sum())), rel=1e-3, abs=1e-6)


def test_without_gradients_only_the_output_error_is_measured(captured: Captured) -> None:
    replay = {"grids": captured.grids[LAYER], "hidden": captured.hidden[LAYER]}
    config = {"layer": LAYER, "menu": MENU}
    both = [
        captured.run(MEASUREMENT_STAGES["module_errors"], config, **replay, **given)
        for given in ({}, {"text_gradients": captured.gradient[LAYER]})
    ]
    without, with_gradient = (
        {
            (row["kind"], row["bits"]): row
            for row in read_rows(captured.path(ref, "module-errors.parquet"), MODULE_ERRORS_SCHEMA)
        }
        for ref in both
    )
    for pair, row in without.items():
        assert row["input_error"] == pytest.approx(with_gradient[pair]["input_error"], rel=1e-4)
        assert row["fisher_diagonal"] is row["fisher_weighted"] is row["delta_loss"] is None


def test_fewer_tokens_than_inputs_are_warned_of(captured: Captured, caplog: pytest.LogCaptureFixture) -> None:
    replay = {"grids": captured.grids[LAYER], "hidden": captured.hidden[LAYER]}
    with caplog.at_level(logging.WARNING):
        captured.run(MEASUREMENT_STAGES["module_errors"], {"layer": LAYER, "menu": MENU}, **replay)
    assert f"layer 2 mlp.down_proj: {TOKENS} tokens are fewer than its 128 inputs" in caplog.text
