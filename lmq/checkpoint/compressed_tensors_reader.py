"""Opening of a compressed-tensors checkpoint as a dense model, decompressed by the compressed-tensors package itself.

transformers 5.23 with compressed-tensors 0.20 cannot open 4-bit checkpoints with zeros as they are: it prepares its
modules on the meta device, where that version does not pack zeros, and then refuses the packed ones. It can with
`quantization_config=CompressedTensorsConfig(dequantize=True)`, but takes the first group's configuration for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmq.errors import InputError, LmqError
from lmq.model.tensors import StoredTensor, read_headers, read_tensors


def open_dense(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with dense weights in `dtype`, all of it in memory.

    Raises InputError for another directory and without the package, LmqError where tensors are missing.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    fields = getattr(config, "quantization_config", None)
    if not isinstance(fields, dict) or fields.get("quant_method") != "compressed-tensors":
        raise InputError(
            f"{path} is not a checkpoint of compressed-tensors: see quantization_config in its config.json"
        )
    del config.quantization_config
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model, found = architecture.from_pretrained(
        None, config=config, state_dict=_dense_state(path, fields), dtype=dtype, output_loading_info=True
    )
    if amiss := {what: sorted(map(str, names)) for what, names in found.items() if names}:
        raise LmqError(f"{path} does not hold the tensors of its model: {amiss}; write it again")
    return model.eval()


def _dense_state(path: Path, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor by name, with dense weights in the place of compressed ones."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    except ImportError as error:
        raise InputError("the package compressed-tensors is not installed; pip install 'lmq[vllm]'") from error
    groups = QuantizationConfig.model_validate(fields).config_groups.values()
    schemes = [group for group in groups if isinstance(group, QuantizationScheme)]
    scheme_of = {target: scheme for scheme in schemes for target in scheme.targets}
    state: dict[str, Tensor] = {}
    for module_path, stored in _by_module(read_headers(path)).items():
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in read_tensors(stored).items()}
        if scheme := scheme_of.get(module_path):
            tensors["weight_scale"] = tensors["weight_scale"].float()
            decompressed = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)
            tensors = {name: tensor for name, tensor in decompressed.items() if name in ("weight", "bias")}
        state |= {f"{module_path}.{name}": tensor for name, tensor in tensors.items()}
    return state


def _by_module(headers: Mapping[str, StoredTensor]) -> dict[str, list[StoredTensor]]:
    modules: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, tensor in headers.items():
        modules[name.rpartition(".")[0]].append(tensor)
    return modules
