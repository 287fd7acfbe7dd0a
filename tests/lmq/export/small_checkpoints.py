"""Checkpoints of tiny models, and what is read from a model made of one."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lmq.checkpoint.write import assemble_checkpoint, quantize_layer, save_layer, write_checkpoint
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.quantizers import quantizer
from lmq.quantizers.weighted import Weighted

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 411, 256]])


def write_small(source: Path, path: Path, *specs: str, axis: int = 1) -> QuantizedCheckpoint:
    """A checkpoint of `source` whose modules take the configurations in turn, all twelve unless some are named."""
    structure = discover(source)
    taken = [QuantSpec.parse(name) for name in specs] or list(STOPS)
    choice = dict(zip((info.id for info in structure.modules), cycle(taken)))
    write_checkpoint(path, source, structure, choice, quantizer("rtn", axis=axis))
    return QuantizedCheckpoint(path)


def write_types(source: Path, path: Path, *specs: str) -> QuantizedCheckpoint:
    """A checkpoint of `source` whose layers take the configurations in turn, types among them."""
    structure, finder = discover(source), Weighted(integer_zeros=True)
    choice = {info.id: QuantSpec.parse(specs[info.id.layer % len(specs)]) for info in structure.modules}
    files = []
    for layer in range(structure.layers):
        weights = {
            info.id: load_layer_weights(source, structure, layer)[info.id.kind] for info in structure.in_layer(layer)
        }
        grids = {}
        for module, weight in weights.items():
            (grids[module],) = finder.quantize(weight[None].float(), torch.eye(weight.shape[1])[None], [choice[module]])
        files.append(path.with_name(f"{path.name}-{layer}.safetensors"))
        save_layer(files[-1], quantize_layer(structure, weights, grids, choice))
    assemble_checkpoint(path, source, structure, choice, files, quantizer=finder)
    return QuantizedCheckpoint(path)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of `TOKENS`, float32."""
    return model.eval()(input_ids=TOKENS).logits.float()
