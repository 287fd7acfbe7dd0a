"""Loading of lmq checkpoints by transformers: after `import lmq`, `from_pretrained(path)` opens them.

A quantized table of embeddings that is the weight of the head too is stored and held once: the head looks at the table,
and transformers has nothing left to tie.

Importing this module registers the method; `lmq.checkpoint.registration` has it imported when transformers needs it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import PrefixChange
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
from lmq.formats.packed_layer import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix, TiedHead
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import embed_scale
from lmq.model.experts import join_experts, split_experts
from lmq.model.structure import expert_number
from lmq.model.tensors import headers_of


class LmqQuantizer(HfQuantizer):
    """Puts a quantized layer in the place of each linear layer and embedding before the tensors are loaded."""

    requires_calibration = True
    quantization_config: LmqConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:  # transformers would leave zeros where tensors are missing, with a warning
            files = [Path(file) for file in checkpoint_files]
            check_quantized_tensors(self.quantization_config, headers_of(files), files[0].parent)
        put_quantized_layers(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        # names that the source was stored by are not those of packed layers, which are saved by the model's own
        model._weight_conversions = [step for step in model._weight_conversions if isinstance(step, PrefixChange)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or model.dtype
        tables: dict[int, nn.Embedding] = {}
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(path, module.to_linear(dtype))
            elif isinstance(module, QuantizedEmbedding):
                tables[id(module)] = module.to_embedding(dtype)
                model.set_submodule(path, tables[id(module)])
        for path, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                model.set_submodule(path, module.to_linear(tables[id(module.table)].get_parameter("weight")))
        join_experts(model)
        del model._weight_conversions  # a plain model again, which transformers saves by the names of its architecture
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
    """Put an empty quantized layer in the place of each linear layer and table that a checkpoint of `config` quantizes.

    Raises InputError naming one that the model does not have, or has in another shape.
    """
    shapes = config.shapes
    experts = {path.rsplit(".", 2)[0] for path in config.modules if expert_number(path) is not None}
    if experts:
        split_experts(model, experts | {path.removeprefix(f"{model.base_model_prefix}.") for path in experts})
    modules = dict(model.named_modules())
    paths = {
        _path_in(model, modules, stored_path): stored_path
        for stored_path in config.modules
        if stored_path in modules or not _is_head_of_another(model, stored_path)
    }
    for path, stored_path in paths.items():
        dense = modules[path]
        if shapes[stored_path] != tuple(dense.weight.shape):
            raise InputError(
                f"the checkpoint's {stored_path} is {list(shapes[stored_path])} where {type(model).__name__} has "
                f"{list(dense.weight.shape)}; its config.json is of another model"
            )
        quantized = _quantized(dense, config.specs[stored_path], config.axis)
        model.set_submodule(path, quantized)
        if isinstance(quantized, QuantizedEmbedding):
            _tie_head(model, path, quantized, paths)


def _quantized(dense: Any, spec: QuantSpec, axis: int) -> QuantizedMatrix:
    """An empty quantized layer for a dense one."""
    where = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    if isinstance(dense, nn.Embedding):
        rows, columns = dense.weight.shape
        return QuantizedEmbedding(rows, columns, spec, embed_scale=embed_scale(dense), **where)
    has_bias = dense.bias is not None
    return QuantizedLinear(dense.in_features, dense.out_features, spec, axis=axis, bias=has_bias, **where)


def _tie_head(model: Any, path: str, table: QuantizedEmbedding, quantized: Container[str]) -> None:
    """Let the model's head look at the quantized table that it shares; a head that is stored apart stays apart."""
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        other = {target: source, source: target}.get(f"{path}.weight")
        if other is None:
            continue
        del tied[target]
        head_path = other.removesuffix(".weight")
        if head_path not in quantized:
            model.set_submodule(head_path, TiedHead(table, model.get_submodule(head_path).bias))
    model._tied_weights_keys = dict(tied)  # what transformers ties anew when it is asked to


def _is_head_of_another(model: Any, path: str) -> bool:
    """Whether a quantized layer is the head that this base model has not."""
    return model.get_output_embeddings() is None and not path.startswith(f"{model.base_model_prefix}.")


def _path_in(model: Any, modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of a layer in this model, which may be the base model of the one that was quantized."""
    for candidate in (path, path.removeprefix(f"{model.base_model_prefix}.")):
        if isinstance(modules.get(candidate), nn.Linear | nn.Embedding):
            return candidate
    raise InputError(
        f"the checkpoint quantizes {path}, which is no linear layer and no embedding of {type(model).__name__}; "
        "open it with the architecture its config.json names"
    )


# importing the module registers the method; a second import, after a reload, finds it there
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(LmqConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(LmqQuantizer)
