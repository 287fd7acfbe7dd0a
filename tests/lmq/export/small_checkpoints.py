"""Checkpoints of tiny models, and what is read from a model made of one."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lmq.checkpoint.write import write_checkpoint
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.discovery import discover
from lmq.quantizers import quantizer

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 411, 256]])


def write_small(source: Path, path: Path, *specs: str, axis: int = 1) -> QuantizedCheckpoint:
    """A checkpoint of `source` whose modules take the configurations in turn, all twelve unless some are named."""
    structure = discover(source)
    taken = [QuantSpec.parse(name) for name in specs] or list(STOPS)
    choice = dict(zip((info.id for info in structure.modules), cycle(taken)))
    write_checkpoint(path, source, structure, choice, quantizer("rtn", axis=axis))
    return QuantizedCheckpoint(path)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of `TOKENS`, float32."""
    return model.eval()(input_ids=TOKENS).logits.float()
