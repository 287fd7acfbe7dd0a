"""Whether a model directory that was written opens by plain `from_pretrained` and computes what it should.

Every checkpoint is opened before it gets its name. Names, ties, and code of the model's class that touches weights
are then no surprise to who opens it next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    encoder the outputs [1, outputs] for one image.

    `prepare` may change a block's weights; without the layers that are not `kept` (None: all).
    """
    hidden = model.embed(model.sample_inputs())
    inputs = model.block_inputs(hidden.shape[1])
    for layer in range(model.structure.layers) if kept is None else kept:
        with model.block(layer) as block:
            if prepare is not None:
                prepare(block, layer)
            hidden = inputs[layer].run(block, hidden)
    return model.head_logits(hidden).float().cpu()


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
            loss = LOSSES[structure.loss]
            caching = {"use_cache": False} if loss.per_token else {}
            found = loss.outputs(opened(sample_inputs(opened), **caching)).float()
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


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference of the logits that are finite on both sides; infinite where only one side is finite."""
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    norm = expected[finite].double().norm()
    return float((found[finite].double() - expected[finite].double()).norm() / norm) if norm else 0.0


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
