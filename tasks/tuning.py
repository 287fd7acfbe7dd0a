"""Stages that tune the grids of an allocation, and keep what they find where the model is nearer to full precision.

Learned rounding moves the codes of every layer by itself; polish then tunes scales and zeros of the whole model, some
steps at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping

from torch import Tensor

from lmq.checkpoint.learned_rounding import RoundingSchedule, channel_importance, learn_rounding
from lmq.checkpoint.polish import Polish, PolishSchedule, polish_file
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import Allocation, LayerGrids, load_grids, save_grids
from lmq.measurement.quantized_model import QuantizedPoint
from lmq.measurement.replay import read_gradients, read_hidden_states, write_hidden_states
from lmq.model.structure import ModuleId
from lmq_tasks.allocate import ALLOCATION_FILE, layer_file, read_configurations
from lmq_tasks.inputs import materialized, open_model, read_examples
from lmq_tasks.measure import GRIDS_FILE, grids_by_layer
from lmq_tasks.stage import Job, stage
from lmq_tasks.states import GRADIENTS_FILE, HIDDEN_STATES_FILE

KEPT_FILE = "kept.json"


@stage("learned-rounding", version=2, schema="learned-rounding/1")
def learned_rounding(job: Job) -> None:
    """Grids of one layer at its configurations, whose rounding was learned from the measured ones.

    Files: the grids, and errors.json with the mean weighted squared error of what leaves the block at every step.
    """
    model, layer = open_model(job), job.config["layer"]
    allocation = read_configurations(job.input("allocation", layer_file(layer)))
    entering, leaving = (read_hidden_states(job.input(name, HIDDEN_STATES_FILE)) for name in ("hidden", "leaving"))
    importance = channel_importance(read_gradients(job.input("drawn_gradients", GRADIENTS_FILE)))
    inputs = model.block_inputs(entering.shape[1])[layer]
    schedule = RoundingSchedule(**job.config["schedule"])
    with model.block(layer) as block:
        grids = load_grids(job.input("grids", GRIDS_FILE))
        found, errors = learn_rounding(
            block, inputs, entering, leaving, importance, grids, allocation, schedule, job.advance
        )
    save_grids(job.output / GRIDS_FILE, found)
    (job.output / "errors.json").write_text(json.dumps(errors))


@stage("learned", version=1, schema="tuned/1")
def learned(job: Job) -> None:
    """The grids to go on with: learned, where that helps on held-out text. Files as those of `_keep_better`."""
    files = job.inputs("learned", GRIDS_FILE)
    _keep_better(job, lambda layer: load_grids(files[layer]))


@stage("last-states", version=1, schema="hidden-states/1")
def last_states(job: Job) -> None:
    """States that leave the unquantized model's last block for a text, without those in between."""
    tokens = read_examples(job).inputs
    write_hidden_states(job.output / HIDDEN_STATES_FILE, _unquantized(job, tokens))


@stage("polish", version=2, schema="polish/1")
def polish(job: Job) -> None:
    """Some steps of polish: from the grids that are given, or from the state that earlier steps left."""
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


@stage("polished", version=2, schema="tuned/1")
def polished(job: Job) -> None:
    """The grids to store: polished, where that helps on held-out text. Files as those of `_keep_better`."""
    tuning = Polish(open_model(job), _allocation(job), materialized(job, "state"), _schedule(job))
    _keep_better(job, tuning.stored)


def _keep_better(job: Job, tuned: Callable[[int], LayerGrids]) -> None:
    """Keep tuned grids, not those given, where the divergence on held-out text falls by more than its standard error.

    Files: the grids of every layer (`tuned_grids_file`), and kept.json with both divergences.
    """
    model, allocation, given = open_model(job), _allocation(job), grids_by_layer(job)
    tokens = read_examples(job, "validation").inputs
    reference = _unquantized(job, tokens)
    before = QuantizedPoint(model, given).divergences(tokens, reference, allocation)
    after = QuantizedPoint(model, tuned).divergences(tokens, reference, allocation)
    falls = before - after
    error = float(falls.std() / len(falls) ** 0.5) if len(falls) > 1 else 0.0
    kept = bool(falls.mean() > error)
    for layer in range(model.structure.layers):
        grids = tuned(layer) if kept else _chosen(given(layer), allocation)
        save_grids(job.output / tuned_grids_file(layer), grids)
    summary = {"divergence_before": before.mean().item(), "divergence_after": after.mean().item()}
    (job.output / KEPT_FILE).write_text(json.dumps({**summary, "fall_stderr": error, "kept": kept}))


def tuned_grids_file(layer: int) -> str:
    """File of the stages `learned` and `polished` that holds the grids of one layer."""
    return f"grids-{layer:03d}.safetensors"


def _unquantized(job: Job, tokens: Tensor) -> Tensor:
    return QuantizedPoint(open_model(job), lambda _: {}).last_states(tokens)


def _allocation(job: Job) -> dict[ModuleId, QuantSpec]:
    return read_configurations(job.input("allocation", ALLOCATION_FILE))


def _schedule(job: Job) -> PolishSchedule:
    return PolishSchedule(**job.config["schedule"])


def _chosen(grids: LayerGrids, allocation: Allocation) -> Mapping[ModuleId, Mapping[QuantSpec, EncodedMatrix]]:
    return {module: {allocation[module]: by_spec[allocation[module]]} for module, by_spec in grids.items()}
