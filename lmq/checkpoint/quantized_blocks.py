"""The weights of a checkpoint put into the blocks of its source model, one block at a time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lmq.checkpoint.write import read_quantization_config, verify_checkpoint
from lmq.formats.packed_layer import QUANTIZED_TENSORS, QuantizedLinear
from lmq.model.structure import ModelStructure
from lmq.model.tensors import read_headers, read_tensors


class QuantizedBlocks:
    """Reads the quantized modules of a checkpoint layer by layer, so that it is evaluated without being loaded.

    Raises DamagedFile or InputError, as `verify_checkpoint` does, when it is opened.
    """

    def __init__(self, path: Path, structure: ModelStructure):
        verify_checkpoint(path)
        self._structure = structure
        config = read_quantization_config(path)
        self._specs, self._axis = config.specs, config.axis
        self._headers = read_headers(path)

    def put_in(self, block: nn.Module, layer: int) -> None:
        """Replace the weights of a source block by the checkpoint's, dequantized to the block's dtype.

        Modules that the checkpoint keeps unquantized stay as they are.
        """
        for module in self._structure.in_layer(layer):
            path = self._structure.path(module.id)
            spec = self._specs.get(path)
            if spec is None:
                continue
            stored = read_tensors(self._headers[f"{path}.{name}"] for name in QUANTIZED_TENSORS)
            quantized = QuantizedLinear(module.in_features, module.out_features, spec, axis=self._axis)
            quantized.load_state_dict({name: stored[f"{path}.{name}"] for name in QUANTIZED_TENSORS})
            linear = block.get_submodule(module.id.kind)
            weight = quantized.dequantize().to(linear.get_parameter("weight"))
            linear.weight = nn.Parameter(weight, requires_grad=False)
