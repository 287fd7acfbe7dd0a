"""Stages of the sequence-wise Fisher cost: gradients for drawn labels, and the cost of every configuration.

Matrix products are taken in bfloat16 where the processor is fast at it: the draws vary far more than its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import backward_block, read_gradients, read_hidden_states, write_gradients
from lmq.measurement.sequence_fisher import (
    SEQUENCE_FISHER_SCHEMA,
    sampled_loss_gradient,
    sequence_fisher,
    sequence_loss_changes,
)
from lmq.measurement.traces import trace_modules
from lmq.model.structure import ModuleInfo
from lmq.numerics import fast_matmul_dtype, fast_products
from lmq.tables import write_rows
from lmq_tasks.capture import GRADIENTS_FILE, HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage

_ERROR_BYTES_AT_ONCE = 5 << 28
"""Bytes of the errors of one module that are held together: a gradient of its weight serves them all."""


@stage("sampled-loss-gradient", version=2, schema="gradients/1")
def sampled_gradient(job: Job) -> None:
    """Gradient of the loss for labels drawn by the model at the states that leave the last block, for every draw."""
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    with fast_products(job.device):
        gradient = sampled_loss_gradient(open_model(job), hidden, draws=job.config["draws"], seed=job.config["seed"])
    write_gradients(job.output / GRADIENTS_FILE, gradient)


@stage("sampled-backward", version=1, schema="gradients/1")
def sampled_backward(job: Job) -> None:
    """Those gradients at the states that enter one block, from the ones at the states that leave it."""
    model = open_model(job)
    layer = job.config["layer"]
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE))
    with model.block(layer) as block, fast_products(job.device):
        inputs = model.block_inputs(hidden.shape[1])[layer]
        entering = backward_block(block, inputs, hidden, gradient, layer=layer)
    write_gradients(job.output / GRADIENTS_FILE, entering)


@stage("sequence-fisher", version=4, schema=SEQUENCE_FISHER_SCHEMA.label)
def measure_sequence_fisher(job: Job) -> None:
    """Sequence-wise Fisher cost of every module of one layer under every configuration of the menu."""
    model = open_model(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE))
    length = hidden.shape[1]
    modules = model.structure.in_layer(layer)
    rows = []
    with model.block(layer) as block:
        inputs = model.block_inputs(length)[layer]
        kinds = [module.id.kind for module in modules]
        with fast_products(job.device):
            traces = trace_modules(block, inputs, hidden, gradient, kinds, fast_matmul_dtype(job.device))
        for module in modules:
            weight = block.get_submodule(module.id.kind).get_parameter("weight").detach()
            trace = traces.pop(module.id.kind)
            changes: dict[QuantSpec, torch.Tensor] = {}
            for specs in _batches(menu, weight.numel() * trace.inputs.element_size()):
                errors = {
                    spec: (grids[module.id][spec].to(job.device).round_trip(weight) - weight).to(trace.inputs.dtype)
                    for spec in specs
                }
                changes |= sequence_loss_changes(trace, errors, sequence_length=length)
                del errors  # before the next are made
            del trace  # of one module only, beside the traces of those that follow
            rows += [_row(module, spec, changes[spec], length) for spec in menu]
    write_rows(job.output / "fisher.parquet", SEQUENCE_FISHER_SCHEMA, rows)


def _batches(menu: Sequence[QuantSpec], error_bytes: int) -> Iterator[Sequence[QuantSpec]]:
    """The menu in pieces whose errors fit into memory together."""
    step = max(1, _ERROR_BYTES_AT_ONCE // error_bytes)
    return (menu[start : start + step] for start in range(0, len(menu), step))


def _row(module: ModuleInfo, spec: QuantSpec, loss_changes: torch.Tensor, sequence_length: int) -> dict[str, Any]:
    return {
        **asdict(module.id),
        **asdict(spec),
        "parameters": module.parameters,
        "size_bytes": spec.size_bytes(module.parameters),
        "fisher": sequence_fisher(loss_changes, tokens_per_sequence=sequence_length - 1),
        "loss_changes": loss_changes.tolist(),
    }
