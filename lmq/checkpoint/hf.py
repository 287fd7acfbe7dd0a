"""Loading of lmq checkpoints by transformers: after `import lmq`, `from_pretrained(path)` opens them.

Importing this module registers the method; `lmq.checkpoint.registration` has it imported when transformers needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from lmq.checkpoint.config import QUANT_METHOD, LmqConfig
from lmq.checkpoint.verify import check_quantized_tensors
from lmq.errors import InputError
from lmq.formats.packed_layer import QuantizedLinear
from lmq.model.tensors import headers_of


class LmqQuantizer(HfQuantizer):
    """Puts a QuantizedLinear in the place of each quantized linear layer before the tensors are loaded."""

    requires_calibration = True
    quantization_config: LmqConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:  # transformers would leave zeros where tensors are missing, with a warning
            files = [Path(file) for file in checkpoint_files]
            check_quantized_tensors(self.quantization_config, headers_of(files), files[0].parent)
        put_quantized_layers(model, self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        quantized = [(path, module) for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        for path, module in quantized:
            model.set_submodule(path, module.to_linear(dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the quantized tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it can be trained (see `lmq.lora`); its codes cannot, nor do they take gradients."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` makes one graph of a quantized layer."""
        return True


def put_quantized_layers(model: Any, config: LmqConfig) -> None:
    """Put an empty QuantizedLinear in the place of each linear layer that a checkpoint of `config` quantizes.

    Raises InputError naming one that the model does not have, or has in another shape.
    """
    shapes = config.shapes
    modules = dict(model.named_modules())
    for stored_path, spec in config.specs.items():
        path = _path_in(model, modules, stored_path)
        linear = modules[path]
        if shapes[stored_path] != (linear.out_features, linear.in_features):
            raise InputError(
                f"the checkpoint's {stored_path} is {list(shapes[stored_path])} where {type(model).__name__} has "
                f"{[linear.out_features, linear.in_features]}; its config.json is of another model"
            )
        quantized = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            spec,
            axis=config.axis,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        model.set_submodule(path, quantized)


def _path_in(model: Any, modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of a linear layer in this model, which may be the base model of the one that was quantized."""
    for candidate in (path, path.removeprefix(f"{model.base_model_prefix}.")):
        if isinstance(modules.get(candidate), nn.Linear):
            return candidate
    raise InputError(
        f"the checkpoint quantizes {path}, which is not a linear layer of {type(model).__name__}; "
        "open it with the architecture its config.json names"
    )


# importing the module registers the method; a second import, after a reload, finds it there
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(LmqConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(LmqQuantizer)
