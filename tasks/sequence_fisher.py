"""Stages of the sequence-wise Fisher cost: gradients for drawn labels, and the cost of every configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lmq.capture import read_gradients, read_hidden_states, write_gradients
from lmq.fisher import fast_matmul_dtype, trace_modules
from lmq.frobenius import load_grids
from lmq.quant_spec import QuantSpec
from lmq.sequence_fisher import (
    SEQUENCE_FISHER_SCHEMA,
    sampled_loss_gradient,
    sequence_fisher,
    sequence_loss_changes,
)
from lmq.structure import ModuleId, ModuleInfo
from lmq.tables import write_rows
from lmq_tasks.capture import GRADIENTS_FILE, HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage


@stage("sampled-loss-gradient", version=1, schema="gradients/1")
def sampled_gradient(job: Job) -> None:
    """Gradient of the loss for labels drawn by the model (seed: the draw) at the states that leave the last block."""
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = sampled_loss_gradient(open_model(job), hidden, seed=job.config["draw"])
    write_gradients(job.output / GRADIENTS_FILE, gradient)


@stage("sequence-fisher", version=1, schema=SEQUENCE_FISHER_SCHEMA.label)
def measure_sequence_fisher(job: Job) -> None:
    """Sequence-wise Fisher cost of every module of one layer under every configuration of the menu.

    `gradient` is a list: one table per draw of labels, all at the states that leave this block.
    """
    model = open_model(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    length = hidden.shape[1]
    modules = model.structure.in_layer(layer)
    changes: dict[ModuleId, list[dict[QuantSpec, torch.Tensor]]] = {module.id: [] for module in modules}
    with model.block(layer) as block:
        inputs = model.block_inputs(length)[layer]
        kinds = [module.id.kind for module in modules]
        for path in job.inputs("gradient", GRADIENTS_FILE):
            traces = trace_modules(block, inputs, hidden, read_gradients(path), kinds, fast_matmul_dtype(job.device))
            for module in modules:
                weight = block.get_submodule(module.id.kind).get_parameter("weight").detach()
                errors = {spec: grids[module.id][spec].to(job.device).round_trip(weight) - weight for spec in menu}
                changes[module.id].append(sequence_loss_changes(traces[module.id.kind], errors, sequence_length=length))
    rows = [
        _row(module, spec, torch.cat([draw[spec] for draw in changes[module.id]]), length)
        for module in modules
        for spec in menu
    ]
    write_rows(job.output / "fisher.parquet", SEQUENCE_FISHER_SCHEMA, rows)


def _row(module: ModuleInfo, spec: QuantSpec, loss_changes: torch.Tensor, sequence_length: int) -> dict[str, Any]:
    return {
        **asdict(module.id),
        **asdict(spec),
        "parameters": module.parameters,
        "size_bytes": spec.size_bytes(module.parameters),
        "fisher": sequence_fisher(loss_changes, tokens_per_sequence=sequence_length - 1),
        "loss_changes": loss_changes.tolist(),
    }
