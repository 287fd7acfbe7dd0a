"""Export as a checkpoint of the hqq library (0.2.8), which `AutoHQQHFModel.from_quantized` opens.

The directory holds `config.json` and `qmodel.pt`, a dictionary of the state of every leaf module. That file is a
pickle made by torch.save, because that is hqq's format; it holds tensors, types and numbers only, so hqq's loader
reads it with `weights_only=True`, which runs no code. lmq never reads one, except to check an export it has just
written.

Codes are those of the checkpoint, in hqq's own packing (3 bits: ten to an int32). Scales and zeros are decoded from
their 8 bits and kept in 16, which is the error of the step and the reason why an hqq checkpoint is larger
(`lmq.allocation.budget.hqq_size_bytes`). hqq dequantizes in the compute type that it is opened with. It also
rounds the frequencies of rotary embeddings to that type, so `compute_dtype=torch.float32` gives the most faithful
model.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from torch import Tensor
from transformers import PreTrainedModel

from lmq.allocation.budget import hqq_size_bytes
from lmq.allocation.targets import list_modules
from lmq.errors import InputError
from lmq.export.dtypes import cast, parse_dtype, with_dtype
from lmq.export.report import ExportReport, ModuleStep, directory_bytes, relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.groups import from_groups, to_groups
from lmq.model.directory import complete_directory, copy_companions, write_json
from lmq.model.skeleton import build_skeleton

ModuleStates = dict[str, dict[str, Any]]
"""hqq's weight file: the state of each leaf module by its dotted path."""


def problems(checkpoint: QuantizedCheckpoint) -> list[str]:
    """Matrices that hqq cannot pack, and what its loader cannot fill in a model of this architecture."""
    unpackable: dict[str, list[str]] = defaultdict(list)
    for path, spec in checkpoint.specs.items():
        out_features, in_features = checkpoint.shapes[path]
        try:
            hqq_size_bytes(out_features * in_features, spec, axis=checkpoint.config.axis)
        except InputError as error:
            unpackable[str(error)].append(path)
    if checkpoint.embeddings:
        unpackable["hqq quantizes no embeddings and no heads"] = checkpoint.embeddings
    if experts := checkpoint.experts:
        unpackable["hqq quantizes nn.Linear, which the experts of a mixture are not in transformers"] = experts
    found = [f"{reason}: {list_modules(paths)}" for reason, paths in unpackable.items()]
    model = _skeleton(checkpoint)
    if "CausalLM" not in type(model).__name__:
        found.append(f"hqq opens language models whose class is named ...ForCausalLM, not {type(model).__name__}")
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    if lost := [name for name in model.state_dict() if name.rpartition(".")[0] not in leaves]:
        names = lost[0] if len(lost) == 1 else f"each of {len(lost)} tensors such as {lost[0]}"
        found.append(f"{names} belongs to a module that holds others; hqq loads the tensors of leaf modules only")
    return found


def export(checkpoint: QuantizedCheckpoint, target: Path, *, dtype: str | None = None) -> ExportReport:
    """Write the directory `target`; hqq's format is one file, so the whole quantized model is in memory.

    `dtype` "float16", "bfloat16" or "float32" is that of scales, zeros and every unquantized float tensor. None keeps
    the unquantized tensors bit for bit and gives scales and zeros float16. Raises InputError listing the `problems`,
    where `target` exists, for another dtype, and naming a tensor that holds values which `dtype` cannot.
    """
    chosen = parse_dtype(dtype) if dtype is not None else None
    if found := problems(checkpoint):
        raise InputError(f"{checkpoint.path} cannot be an hqq checkpoint: {'; '.join(found)}")
    model = _skeleton(checkpoint)
    config = {**checkpoint.model_config, "architectures": [type(model).__name__]}
    with complete_directory(target) as directory:
        states = _unquantized_states(checkpoint, model, chosen)
        steps = {}
        for path in checkpoint.specs:
            layer, steps[path] = _layer(checkpoint, path, chosen or torch.float16, states[path].get("bias"))
            states[path] = layer.state_dict()
        _save(states, directory)
        copy_companions(checkpoint.path, directory)
        write_json(directory / "config.json", with_dtype(config, chosen) if chosen is not None else config)
    return ExportReport(path=target, size_bytes=directory_bytes(target), steps=steps)


def _save(states: ModuleStates, directory: Path) -> None:
    try:
        AutoHQQHFModel.save_weights(dict(states), str(directory))
    except RuntimeError as error:  # what torch.save raises where a disk is full
        raise OSError(f"torch could not write its file: {error}") from error


def _skeleton(checkpoint: QuantizedCheckpoint) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory) / "config.json", checkpoint.model_config)
        return build_skeleton(Path(directory))


def _unquantized_states(
    checkpoint: QuantizedCheckpoint, model: PreTrainedModel, dtype: torch.dtype | None
) -> ModuleStates:
    """State of every leaf module but for the quantized matrices; tied tensors, which are kept once, in each of them."""
    states: ModuleStates = defaultdict(dict)
    stored = checkpoint.model_tensors
    values = stored.read(name for name in model.state_dict() if stored.holds(name))
    converted: dict[int, Tensor] = {}
    for name, value in values.items():
        if id(value) not in converted:
            converted[id(value)] = cast(value, dtype, name)
        path, _, parameter = name.rpartition(".")
        states[path][parameter] = converted[id(value)]
    return states


def _layer(
    checkpoint: QuantizedCheckpoint, path: str, dtype: torch.dtype, bias: Tensor | None
) -> tuple[HQQLinear, ModuleStep]:
    """hqq's own layer with the codes and the grid of a matrix, and what the rounding of the grid changed."""
    grid = checkpoint.grid(path)
    spec, axis = grid.spec, grid.axis
    codes = to_groups(checkpoint.codes(path), spec.group_size, axis)
    scale, zero = (cast(values, dtype, f"the grid of {path}")[:, None] for values in grid.decode())
    packing = Quantizer.bit_to_packing[spec.bits]
    layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    layer.quant_config = BaseQuantizeConfig(nbits=spec.bits, group_size=spec.group_size, axis=axis)
    layer.offload_meta = layer.quant_config.pop("offload_meta")
    layer.encoded_state_dict = False  # the values as they are: the encoding is for safetensors
    layer.bias = bias
    layer.W_q = torch.nn.Parameter(Quantizer.pack[packing](_oriented(codes, axis)), requires_grad=False)
    layer.meta = {
        "nbits": spec.bits,
        "group_size": spec.group_size,
        "shape": torch.Size(grid.shape),
        "scale": _oriented(scale, axis),
        "zero": _oriented(zero, axis),
        "axis": axis,
        "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": dtype,
    }
    written = from_groups((codes.float() - zero.float()) * scale.float(), grid.shape, axis)
    error = relative_error(written, grid.dequantize(codes))
    return layer, ModuleStep(target=f"{packing} g{spec.group_size}", relative_error=error)


def _oriented(groups: Tensor, axis: int) -> Tensor:
    """A table with a row per group as hqq keeps it: with a column per group for axis 0."""
    return (groups if axis == 1 else groups.t()).contiguous()
