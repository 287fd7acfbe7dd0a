"""The grids of every configuration for a layer's matrices: fitted, kept in one file, read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lmq.errors import DamagedFile, InputError
from lmq.formats.coded_grid import CODES_TENSOR, CodedGrid, EncodedMatrix
from lmq.formats.gguf_types import BLOCKS_TENSOR, GGUF_TYPES, GgufMatrix
from lmq.formats.groups import GRID_TENSORS, Grid, encode
from lmq.formats.spec import QuantSpec
from lmq.measurement.upper_triangle import UpperTriangle
from lmq.model.structure import ModuleId
from lmq.numerics import require_finite
from lmq.quantizers import CALIBRATED, CalibratedQuantizer, Quantizer
from lmq.quantizers.error_feedback import stacked

Allocation = Mapping[ModuleId, QuantSpec]
"""Configuration of every module."""

LayerGrids = Mapping[ModuleId, Mapping[QuantSpec, EncodedMatrix]]

_METADATA_KEY = "lmq.grids"
_FORMAT_VERSION = 1
_WEIGHTS_AT_ONCE = 1 << 26
"""Weights that go through a calibrated quantizer together."""


def fit_grids(
    weight: torch.Tensor, menu: Iterable[QuantSpec], quantizer: Quantizer, name: str = "the weight"
) -> dict[QuantSpec, EncodedMatrix]:
    """The stored grid of `weight` [out_features, in_features] for each configuration.

    Raises NotFiniteError for a weight with NaN or infinity, InputError for a configuration whose group size
    does not divide the number of weights, and for a quantizer that needs more than the weight.
    """
    menu = tuple(menu)
    _require_quantizable(weight, menu, name)
    if isinstance(quantizer, CalibratedQuantizer):
        raise InputError(f"quantizer {quantizer.name!r} needs second moments; give them to quantize_modules")
    if types := [spec.name for spec in menu if spec.gguf is not None]:
        raise InputError(f"quantizer {quantizer.name!r} finds no codes of {types[0]}; take {', '.join(CALIBRATED)}")
    return {
        spec: encode(
            weight, *quantizer.fit(weight, spec), spec, quantizer.axis, integer_zeros=bool(quantizer.integer_zeros)
        )
        for spec in menu
    }


def quantize_modules(
    weights: Mapping[ModuleId, torch.Tensor],
    menu: Sequence[QuantSpec],
    quantizer: Quantizer,
    moments: Mapping[ModuleId, UpperTriangle] | None = None,
) -> dict[ModuleId, dict[QuantSpec, EncodedMatrix]]:
    """Grids of a layer's modules for each configuration, with their codes where the quantizer chooses them.

    `weights` are [out_features, in_features], `moments` those of each module's inputs, for calibrated quantizers,
    through which modules of one shape go together. Raises as `fit_grids` does, and InputError for a calibrated
    quantizer without moments.
    """
    if not isinstance(quantizer, CalibratedQuantizer):
        return {module: fit_grids(weight, menu, quantizer, str(module)) for module, weight in weights.items()}
    if moments is None:
        raise InputError(
            f"quantizer {quantizer.name!r} needs second moments of every module's inputs: measure them "
            "(lmq.measurement.quantizer_moments), or take hqq or rtn, which look at weights alone"
        )
    found: dict[ModuleId, dict[QuantSpec, EncodedMatrix]] = {}
    for modules in _alike(weights):
        for module in modules:
            _require_quantizable(weights[module], menu, str(module))
        matrices = stacked([weights[module] for module in modules])
        of_inputs = stacked([moments[module].matrix().to(matrices.device) for module in modules])
        for module, matrix in zip(modules, of_inputs, strict=True):
            require_finite(matrix, f"the second moments of the inputs of {module}")
        found |= zip(modules, quantizer.quantize(matrices, of_inputs, menu), strict=True)
    return {module: found[module] for module in weights}


def _require_quantizable(weight: torch.Tensor, menu: Iterable[QuantSpec], name: str) -> None:
    require_finite(weight, name)
    for spec in menu:
        spec.size_bytes(weight.numel(), weight.shape[1])


def _alike(weights: Mapping[ModuleId, torch.Tensor]) -> Iterator[list[ModuleId]]:
    """Modules of one shape, as many together as fit into memory."""
    by_shape: dict[torch.Size, list[ModuleId]] = {}
    for module, weight in weights.items():
        by_shape.setdefault(weight.shape, []).append(module)
    for shape, modules in by_shape.items():
        step = max(1, _WEIGHTS_AT_ONCE // shape.numel())
        yield from (modules[start : start + step] for start in range(0, len(modules), step))


def save_grids(path: Path, grids: LayerGrids) -> None:
    """Write the grids of a layer's modules as one safetensors file; the same grids give the same bytes."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for module in sorted(grids):
        for spec in sorted(grids[module]):
            grid = grids[module][spec]
            # what several configurations become is stored once
            stored_as = grid.kind.name if isinstance(grid, GgufMatrix) else f"{spec}m{spec.meta_group_size}"
            key = f"{module.layer}.{module.kind}.{stored_as}"
            entries.append({"key": key, "module": asdict(module), "spec": asdict(spec), **_grid_layout(grid)})
            stored = _tensors_of(grid)
            tensors |= {f"{key}.{name}": tensor.cpu().contiguous() for name, tensor in stored.items()}
    header = json.dumps({"format_version": _FORMAT_VERSION, "grids": entries}, sort_keys=True)
    save_file(tensors, path, metadata={_METADATA_KEY: header})


def _tensors_of(matrix: EncodedMatrix) -> dict[str, torch.Tensor]:
    if isinstance(matrix, GgufMatrix):
        return {BLOCKS_TENSOR: matrix.blocks}
    return matrix.coded_tensors() if isinstance(matrix, CodedGrid) else matrix.to_tensors()


def _grid_layout(grid: EncodedMatrix) -> dict[str, Any]:
    if isinstance(grid, GgufMatrix):
        return {"shape": list(grid.shape), "type": grid.kind.name}
    layout = {"shape": list(grid.shape), "axis": grid.axis}
    return {**layout, "coded": True} if isinstance(grid, CodedGrid) else layout


def load_grids(path: Path) -> dict[ModuleId, dict[QuantSpec, EncodedMatrix]]:
    """Read what `save_grids` wrote. Raises DamagedFile if it cannot be read."""
    grids: dict[ModuleId, dict[QuantSpec, EncodedMatrix]] = {}
    try:
        with safe_open(path, "pt") as file:
            for entry in json.loads(file.metadata()[_METADATA_KEY])["grids"]:
                spec = QuantSpec(**entry["spec"])
                shape = (entry["shape"][0], entry["shape"][1])
                by_spec = grids.setdefault(ModuleId(**entry["module"]), {})
                if "type" in entry:
                    blocks = file.get_tensor(f"{entry['key']}.{BLOCKS_TENSOR}")
                    by_spec[spec] = GgufMatrix(GGUF_TYPES[entry["type"]].of_rows(shape[1]), shape, blocks)
                    continue
                tensors = {name: file.get_tensor(f"{entry['key']}.{name}") for name in GRID_TENSORS}
                grid = Grid.from_tensors(tensors, spec, shape, entry["axis"])
                if "coded" in entry:
                    grid = CodedGrid.from_grid(grid, file.get_tensor(f"{entry['key']}.{CODES_TENSOR}"))
                by_spec[spec] = grid
    except (SafetensorError, InputError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{path} is not a readable file of grids: {error}; remove it, it will be made again"
        ) from error
    return grids
