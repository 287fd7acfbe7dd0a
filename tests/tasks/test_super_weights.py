from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmq.measurement.replay import read_hidden_states
from lmq.measurement.super_weights import SUPER_WEIGHTS_SCHEMA
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.tables import read_rows
from lmq_tasks.measure import MEASUREMENT_STAGES
from lmq_tasks.states import HIDDEN_STATES_FILE
from tests.tasks.conftest import LENGTH, Captured

LAYER = 1


@torch.no_grad()
def test_spikes_are_the_largest_inputs_and_outputs_of_the_down_projection(captured: Captured, tiny_qwen: Path) -> None:
    found = captured.run(MEASUREMENT_STAGES["super_weights"], {"layer": LAYER}, hidden=captured.hidden[LAYER])
    (row,) = read_rows(captured.path(found, "super-weights.parquet"), SUPER_WEIGHTS_SCHEMA)
    assert (row["layer"], row["kind"]) == (LAYER, "mlp.down_proj")
    for side, states in zip(("input", "output"), _plain_states(captured, tiny_qwen), strict=True):
        place = int(states.abs().argmax())
        assert row[f"{side}_spike"] == pytest.approx(float(states.abs().max()), rel=1e-5)
        assert (row[f"{side}_token"], row[f"{side}_channel"]) == divmod(place, states.shape[1])
        rms = float(states.double().square().mean().sqrt())
        assert row[f"{side}_rms_ratio"] == pytest.approx(float(states.abs().max()) / rms, rel=1e-5)


def _plain_states(captured: Captured, model_dir: Path) -> tuple[Tensor, Tensor]:
    """Inputs and outputs [tokens, features] of the down projection, all sequences at once."""
    model = StreamedModel.open(model_dir, discover(model_dir, weights_sha256="0"))
    hidden = read_hidden_states(captured.path(captured.hidden[LAYER], HIDDEN_STATES_FILE))
    seen: list[Tensor] = []
    with model.block(LAYER) as block:
        handle = block.get_submodule("mlp.down_proj").register_forward_hook(
            lambda _, args, output: seen.extend((args[0].flatten(0, 1), output.flatten(0, 1)))
        )
        for sequence in hidden.split(1):
            model.block_inputs(LENGTH)[LAYER].run(block, sequence)
        handle.remove()
    return torch.cat(seen[::2]), torch.cat(seen[1::2])
