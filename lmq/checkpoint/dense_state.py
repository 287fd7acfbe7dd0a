"""Checkpoints of other programs as dense weights: every tensor by name, dequantized in float32.

GPTQ, AutoRound and AWQ are read from their layouts (`lmq.formats.integer_words`), without the packages whose kernels
compute with them: bits, groups and shapes follow from the tensors.

compressed-tensors are decompressed by the package: transformers 5.23 with compressed-tensors 0.20 cannot open 4-bit
checkpoints with zeros as they are. It prepares its modules on the meta device, where that version does not pack zeros,
and then refuses the packed ones. It can with `quantization_config=CompressedTensorsConfig(dequantize=True)`, but takes
the first group's configuration for all. And 4-bit floats it computes with in bfloat16 alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.errors import DamagedFile, InputError
from lmq.formats.integer_words import awq_weight, gptq_weight
from lmq.model.tensors import StoredTensor, read_headers, read_tensors

Unpack = Callable[[Mapping[str, Tensor]], Tensor]

_GPTQ_LAYOUTS: Mapping[str, Unpack] = {
    "gptq": partial(gptq_weight, zero_offset=1),
    "gptq_v2": partial(gptq_weight, zero_offset=0),
}
_AUTO_ROUND_LAYOUTS: Mapping[str, Unpack] = {
    "auto_round": partial(gptq_weight, zero_offset=0),
    "auto_round:gptqmodel": partial(gptq_weight, zero_offset=0),
    "auto_round:auto_gptq": partial(gptq_weight, zero_offset=1),
    "auto_round:auto_awq": awq_weight,
}
_AWQ_LAYOUTS: Mapping[str, Unpack] = {"gemm": awq_weight}


def _gptq(path: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    layout = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    return _unpacked(path, _layout(path, "GPTQ", layout, _GPTQ_LAYOUTS), dtype)


def _auto_round(path: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    layout = fields.get("packing_format", "auto_round:auto_gptq")
    return _unpacked(path, _layout(path, "AutoRound", layout, _AUTO_ROUND_LAYOUTS), dtype)


def _awq(path: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    layout = fields.get("version") or fields.get("format") or "gemm"
    return _unpacked(path, _layout(path, "AWQ", str(layout).lower(), _AWQ_LAYOUTS), dtype)


def _layout(path: Path, program: str, name: object, known: Mapping[str, Unpack]) -> Unpack:
    if name not in known:
        raise InputError(
            f"{path} has the {program} layout {name!r}, which lmq does not read; it reads {', '.join(known)}"
        )
    return known[str(name)]


def _unpacked(path: Path, unpack: Unpack, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor by name, with the weights of the modules that have a `qweight`."""
    state: dict[str, Tensor] = {}
    if not any(name.endswith(".qweight") for name in read_headers(path)):
        raise DamagedFile(f"{path} holds no qweight, though its config.json says it is quantized; write it again")
    for module_path, tensors in _modules(path):
        if "qweight" in tensors:
            try:
                weight = unpack(tensors).to(dtype)
            except (KeyError, IndexError, DamagedFile, InputError) as error:
                raise DamagedFile(f"{module_path} in {path} cannot be unpacked: {error}; download it again") from error
            packed = ("qweight", "qzeros", "scales", "g_idx")
            tensors = {"weight": weight, **{name: tensors[name] for name in tensors.keys() - packed}}
        state |= {f"{module_path}.{name}".lstrip("."): tensor for name, tensor in tensors.items()}
    return state


def _compressed_tensors(path: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
        from compressed_tensors.utils.match import match_name
    except ImportError as error:
        raise InputError("the package compressed-tensors is not installed; pip install 'lmq[vllm]'") from error
    config = QuantizationConfig.model_validate(fields)
    schemes = [group for group in config.config_groups.values() if isinstance(group, QuantizationScheme)]
    of_all = [scheme for scheme in schemes if "Linear" in scheme.targets]
    state: dict[str, Tensor] = {}
    for module_path, tensors in _modules(path):
        named = [scheme for scheme in schemes if any(match_name(module_path, target) for target in scheme.targets)]
        if "weight_scale" in tensors and (named or of_all):
            scheme = (named or of_all)[0]
            tensors["weight_scale"] = tensors["weight_scale"].float()
            compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
            decompressed = compressor.decompress(tensors, scheme)
            tensors = {name: tensor.to(dtype) for name, tensor in decompressed.items() if name in ("weight", "bias")}
        state |= {f"{module_path}.{name}": tensor for name, tensor in tensors.items()}
    return state


def _modules(path: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each module with its stored tensors, by the names that they have in it."""
    modules: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, tensor in read_headers(path).items():
        modules[name.rpartition(".")[0]].append(tensor)
    for module_path, stored in modules.items():
        yield module_path, {name.rpartition(".")[2]: tensor for name, tensor in read_tensors(stored).items()}


DENSE_STATES: Mapping[str, Callable[[Path, Mapping[str, Any], torch.dtype], dict[str, Tensor]]] = {
    "gptq": _gptq,
    "auto-round": _auto_round,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
"""Every tensor of a model directory, with dense weights in a dtype, by the method in its configuration.

Raise InputError for a layout that is not read and without a package that it takes, DamagedFile for tensors that do not
go together.
"""

SELF_READ = frozenset(DENSE_STATES) - {"compressed-tensors"}
"""Those that are read from their layouts alone, without a package."""


def has_float4(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration of compressed-tensors has matrices of 4-bit floats."""
    groups = fields.get("config_groups") or {}
    formats = [fields.get("format"), *(group.get("format") for group in groups.values())]
    return any(str(name).endswith("fp4-pack-quantized") for name in formats)
