"""Whether a model directory that was written opens by plain `from_pretrained` and computes what it should.

Every checkpoint is opened before it gets its name. Names, ties, and code of the model's class that touches weights
are then no surprise to who opens it next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmq.checkpoint.open import DOES_NOT_OPEN, open_model_directory, read_stored_directory
from lmq.errors import LmqError
from lmq.model.losses import LOSSES
from lmq.model.streaming import StreamedModel, sample_inputs
from lmq.model.structure import ModelStructure
from lmq.model.tensors import read_headers, size_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENED_WHOLE_BYTES = 10**9
"""Larger models are opened a block at a time: the same names and code, one block in memory."""

_TOLERANCE = 1e-3
"""Relative difference of logits; products of packed weights round otherwise than those of dense ones, by 1e-6."""


@torch.no_grad()
def sample_logits(
    model: StreamedModel,
    *,
    prepare: Callable[[nn.Module, int], None] | None = None,
    kept: Sequence[int] | None = None,
) -> Tensor:
    """Logits [1, tokens, vocabulary] of a model read block by block, for the tokens that `check_opens` takes; of an
    encoder the outputs [towers, outputs] for one image, and one text where it has a tower for them.

    `prepare` may change a block's weights; without the layers that are not `kept` (None: all).
    """
    found = []
    for tower in model.structure.judged_towers:
        sample = model.sample_inputs(tower=tower)
        hidden = model.embed(sample, tower)
        inputs = model.block_inputs(hidden.shape[1])
        for layer in model.structure.layers_of(tower) if kept is None else kept:
            with model.block(layer) as block:
                if prepare is not None:
                    prepare(block, layer)
                hidden = inputs[layer].run(block, hidden)
        given = None if model.loss.per_token else sample
        found.append(model.head_logits(hidden, tower, given).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def check_opens(
    path: Path, expected: Tensor, structure: ModelStructure, *, whole_bytes: int = OPENED_WHOLE_BYTES
) -> None:
    """Raise LmqError unless the model directory `path` opens and gives the logits `expected` of `sample_logits`.

    A plain directory or a checkpoint of lmq; `structure` is that of the model in it. Above `whole_bytes` of tensors it
    is read block by block, otherwise opened by `from_pretrained`.
    """
    try:
        if sum(size_bytes(tensor) for tensor in read_headers(path).values()) <= whole_bytes:
            opened: PreTrainedModel = open_model_directory(path, dtype=torch.float32)
            found = _sampled_by(opened, structure)
        else:
            cpu = torch.device("cpu")
            found = sample_logits(StreamedModel(read_stored_directory(path), structure, cpu, torch.float32))
    except (LmqError, *DOES_NOT_OPEN) as error:
        raise LmqError(
            f"what was written of {structure.architecture} does not open again ({type(error).__name__}: "
            f"{_first_line(error)}), so it was not kept; the model's class does not take such a checkpoint"
        ) from error
    difference = _difference(found, expected)
    if not difference <= _TOLERANCE:
        raise LmqError(
            f"what was written of {structure.architecture} opens, but its logits differ by {difference:.2g} (relative) "
            "from those that were measured, so it was not kept; the model computes with something that is neither in "
            "its tensors nor in its configuration"
        )


def _sampled_by(opened: Any, structure: ModelStructure) -> Tensor:
    """What a model that is opened whole makes of the inputs of `sample_logits`."""
    loss = LOSSES[structure.loss]
    if loss.per_token:
        return loss.outputs(opened(sample_inputs(opened), use_cache=False)).float()
    found = []
    for tower in structure.towers:
        features = opened if tower.features is None else getattr(opened, tower.features)
        found.append(loss.outputs(features(sample_inputs(opened, tower=tower))).float())
    return torch.cat(found)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference of the logits that are finite on both sides; infinite where only one side is finite."""
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    norm = expected[finite].double().norm()
    return float((found[finite].double() - expected[finite].double()).norm() / norm) if norm else 0.0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
