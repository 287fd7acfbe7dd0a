"""Loading of lmq checkpoints by transformers: after `import lmq`, `from_pretrained(path)` opens them.

Importing this module registers the method; `lmq.registration` has it imported when transformers needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmq.errors import InputError
from lmq.linear import QuantizedLinear
from lmq.quant_spec import QuantSpec

QUANT_METHOD = "lmq"
FORMAT_VERSION = 2


class LmqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json.

    `modules` maps the dotted path of each quantized matrix to its `shape` [out_features, in_features] and the fields
    of its QuantSpec; `axis` is that of the groups, `quantizer` describes how the grids were fitted. Raises InputError
    for a format this version cannot read.
    """

    def __init__(
        self,
        *,
        modules: Mapping[str, Mapping[str, Any]],
        axis: int,
        quantizer: Mapping[str, Any],
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ):
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has lmq format version {format_version}, this lmq reads version {FORMAT_VERSION}; "
                "install the version of lmq that wrote it"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.axis = axis
        self.quantizer = dict(quantizer)
        self.modules = {path: dict(fields) for path, fields in modules.items()}

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Configuration of each quantized matrix, by dotted path."""
        return {
            path: QuantSpec(**{name: value for name, value in fields.items() if name != "shape"})
            for path, fields in self.modules.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """out_features and in_features of each quantized matrix, by dotted path."""
        return {path: (fields["shape"][0], fields["shape"][1]) for path, fields in self.modules.items()}


class LmqQuantizer(HfQuantizer):
    """Puts a QuantizedLinear in the place of each quantized linear layer before the tensors are loaded."""

    requires_calibration = True
    quantization_config: LmqConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for path, spec in self.quantization_config.specs.items():
            path = _path_in(model, path)
            linear = model.get_submodule(path)
            quantized = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                spec,
                axis=self.quantization_config.axis,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            model.set_submodule(path, quantized)

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
        """Codes cannot be trained."""
        return False


def _path_in(model: Any, path: str) -> str:
    """The path of a linear layer in this model, which may be the base model of the one that was quantized."""
    modules = dict(model.named_modules())
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
