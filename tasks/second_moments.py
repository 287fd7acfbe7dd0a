"""Stage of the errors of single modules: e(m, c) and cheap forms of the loss-aware cost, from second moments."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from lmq.formats.spec import QuantSpec
from lmq.measurement.grids import load_grids
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.second_moments import (
    MODULE_ERRORS_SCHEMA,
    ModuleStatistics,
    capture_second_moments,
    traced_statistics,
)
from lmq.measurement.traces import trace_modules
from lmq.model.streaming import BlockInputs
from lmq.model.structure import ModuleInfo
from lmq.tables import write_rows
from lmq_tasks.capture import GRADIENTS_FILE, HIDDEN_STATES_FILE
from lmq_tasks.opened import open_model
from lmq_tasks.stage import Job, stage

_log = logging.getLogger(__name__)


@stage("module-errors", version=3, schema=MODULE_ERRORS_SCHEMA.label)
def measure_module_errors(job: Job) -> None:
    """Mean squared output error of every module of one layer under every configuration of the menu.

    With the loss gradient of the text also two estimates of the token-wise Fisher cost and the delta loss, whose
    gradient is the one at full precision: a first-order stand-in for the gradient at the quantized point.
    """
    model = open_model(job)
    layer = job.config["layer"]
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    grids = load_grids(job.input("frobenius", "grids.safetensors"))
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE)) if job.has("gradient") else None
    modules = {module.id.kind: module for module in model.structure.in_layer(layer)}
    tokens = hidden.shape[0] * hidden.shape[1]
    _warn_of_few_tokens(list(modules.values()), tokens)
    rows = []
    with model.block(layer) as block:
        inputs = model.block_inputs(hidden.shape[1])[layer]
        for kind, statistics in _statistics(block, inputs, hidden, gradient, list(modules)):
            module = modules[kind]
            weight = block.get_submodule(kind).get_parameter("weight").detach()
            for spec in menu:
                error = grids[module.id][spec].to(job.device).round_trip(weight) - weight
                rows.append(
                    {
                        **asdict(module.id),
                        **asdict(spec),
                        "parameters": module.parameters,
                        "size_bytes": spec.size_bytes(module.parameters),
                        "tokens": tokens,
                        "in_features": module.in_features,
                        **statistics.costs(error),
                    }
                )
    write_rows(job.output / "module-errors.parquet", MODULE_ERRORS_SCHEMA, rows)


def _statistics(
    block: nn.Module, inputs: BlockInputs, hidden: Tensor, gradient: Tensor | None, kinds: Sequence[str]
) -> Iterable[tuple[str, ModuleStatistics]]:
    if gradient is not None:
        return traced_statistics(trace_modules(block, inputs, hidden, gradient, kinds, torch.float32))
    moments = capture_second_moments(block, inputs, hidden, kinds)
    return ((kind, ModuleStatistics(found)) for kind, found in moments.items())


def _warn_of_few_tokens(modules: Sequence[ModuleInfo], tokens: int) -> None:
    wide = max(modules, key=lambda module: module.in_features)
    if tokens < wide.in_features:
        _log.warning(
            "%s: %d tokens are fewer than its %d inputs; errors in the directions that no token has count as 0. "
            "Measure on more calibration tokens",
            wide.id,
            tokens,
            wide.in_features,
        )
