"""Stages of polish: scales and zeros of an allocation are tuned, some steps at a time, and kept where that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

from torch import Tensor

from lmq.checkpoint.polish import Polish, PolishSchedule, polish_file
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation, LayerGrids, save_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.replay import read_hidden_states, write_hidden_states
from lmq.model.structure import ModuleId
from lmq_tasks.allocate import ALLOCATION_FILE, read_configurations
from lmq_tasks.inputs import materialized, open_model, read_examples
from lmq_tasks.measure import grids_by_layer
from lmq_tasks.stage import Job, stage
from lmq_tasks.states import HIDDEN_STATES_FILE

POLISHED_FILE = "polished.json"


@stage("last-states", version=1, schema="hidden-states/1")
def last_states(job: Job) -> None:
    """States that leave the unquantized model's last block for a text, without those in between."""
    tokens = read_examples(job).inputs
    write_hidden_states(job.output / HIDDEN_STATES_FILE, _unquantized(job, tokens))


@stage("polish", version=2, schema="polish/1")
def polish(job: Job) -> None:
    """Some steps of polish: from the measured grids, or from the state that earlier steps left."""
    model = open_model(job)
    tuning = Polish(model, _allocation(job), job.output, _schedule(job))
    if job.has("state"):
        for layer in range(model.structure.layers):
            shutil.copyfile(job.input("state", polish_file(layer)), job.output / polish_file(layer))
    else:
        tuning.start(grids_by_layer(job))
    tokens = read_examples(job).inputs
    reference = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    divergences = list(tuning.run(job.config["first"], job.config["last"], tokens, reference))
    (job.output / "divergences.json").write_text(json.dumps(divergences))


@stage("polished", version=1, schema="polished/1")
def polished(job: Job) -> None:
    """The grids to store: polished where the divergence on held-out text falls by more than its standard error.

    Files: the grids of every layer (`polished_grids_file`), and polished.json with both divergences.
    """
    model, allocation, measured = open_model(job), _allocation(job), grids_by_layer(job)
    tuning = Polish(model, allocation, materialized(job, "state"), _schedule(job))
    tokens = read_examples(job, "validation").inputs
    reference = _unquantized(job, tokens)
    before = QuantizedPoint(model, measured).divergences(tokens, reference, allocation)
    after = QuantizedPoint(model, tuning.stored).divergences(tokens, reference, allocation)
    falls = before - after
    error = float(falls.std() / len(falls) ** 0.5) if len(falls) > 1 else 0.0
    kept = bool(falls.mean() > error)
    for layer in range(model.structure.layers):
        grids = tuning.stored(layer) if kept else _chosen(measured(layer), allocation)
        save_grids(job.output / polished_grids_file(layer), grids)
    summary = {"divergence_before": before.mean().item(), "divergence_after": after.mean().item()}
    (job.output / POLISHED_FILE).write_text(json.dumps({**summary, "fall_stderr": error, "kept": kept}))


def polished_grids_file(layer: int) -> str:
    """File of the stage `polished` that holds the grids of one layer."""
    return f"grids-{layer:03d}.safetensors"


def _unquantized(job: Job, tokens: Tensor) -> Tensor:
    return QuantizedPoint(open_model(job), lambda _: {}).last_states(tokens)


def _allocation(job: Job) -> dict[ModuleId, QuantSpec]:
    return read_configurations(job.input("allocation", ALLOCATION_FILE))


def _schedule(job: Job) -> PolishSchedule:
    return PolishSchedule(**job.config["schedule"])


def _chosen(grids: LayerGrids, allocation: Allocation) -> Mapping[ModuleId, Mapping[QuantSpec, EncodedMatrix]]:
    return {module: {allocation[module]: by_spec[allocation[module]]} for module, by_spec in grids.items()}
