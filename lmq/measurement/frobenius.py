"""Grids of every configuration for a layer's matrices, and the Frobenius error table of MXQ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lmq.errors import DamagedFile, InputError
from lmq.finite import require_finite
from lmq.formats.groups import GRID_TENSORS, Grid, encode, group_blocks, nearest_codes, to_groups
from lmq.formats.nf4 import NormalFloat4
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId
from lmq.quantizers import Quantizer
from lmq.tables import MODULE_FIELDS, SPEC_FIELDS, TableSchema

FROBENIUS_SCHEMA = TableSchema(
    "frobenius",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            *SPEC_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("frobenius_error", pa.float64(), nullable=False),
            pa.field("frobenius_norm", pa.float64(), nullable=False),
        ]
    ),
)

LayerGrids = Mapping[ModuleId, Mapping[QuantSpec, Grid]]

_METADATA_KEY = "lmq.grids"
_FORMAT_VERSION = 1


def fit_grids(
    weight: torch.Tensor, menu: Iterable[QuantSpec], quantizer: Quantizer, name: str = "the weight"
) -> dict[QuantSpec, Grid]:
    """The stored grid of `weight` [out_features, in_features] for each configuration.

    Raises NotFiniteError for a weight with NaN or infinity, InputError for a configuration whose group size
    does not divide the number of weights.
    """
    require_finite(weight, name)
    menu = tuple(menu)
    for spec in menu:
        spec.groups(weight.numel())
    return {
        spec: encode(weight, *quantizer.fit(weight, spec), spec, quantizer.axis, integer_zeros=quantizer.integer_zeros)
        for spec in menu
    }


def frobenius_norm(weight: torch.Tensor) -> float:
    """‖W‖_F, accumulated in float64."""
    blocks = weight.detach().reshape(-1).split(1 << 16)
    return sum(_square_sum(block) for block in blocks) ** 0.5


def frobenius_errors(weight: torch.Tensor, rounded_to: Sequence[Grid | NormalFloat4]) -> list[float]:
    """‖W − Ŵ‖_F of each grid, Ŵ being what the checkpoint will hold, or of NF4; accumulated in float64."""
    return [_frobenius_error(weight, item) for item in rounded_to]


def _frobenius_error(weight: torch.Tensor, rounded_to: Grid | NormalFloat4) -> float:
    if isinstance(rounded_to, Grid):
        return _grid_error(weight, rounded_to)
    return frobenius_norm(rounded_to.round_trip(weight) - weight.detach())


def _grid_error(weight: torch.Tensor, grid: Grid) -> float:
    groups = to_groups(weight.detach(), grid.spec.group_size, grid.axis)
    scale, zero = grid.decode()
    total = 0.0
    for block in group_blocks(groups):
        quantized = nearest_codes(groups[block], scale[block], zero[block], grid.spec.bits)
        error = quantized.sub_(zero[block, None]).mul_(scale[block, None]).sub_(groups[block])
        total += _square_sum(error)
    return total**0.5


def _square_sum(values: torch.Tensor) -> float:
    return float(values.to(torch.float64).square().sum())


def save_grids(path: Path, grids: LayerGrids) -> None:
    """Write the grids of a layer's modules as one safetensors file; the same grids give the same bytes."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for module in sorted(grids):
        for spec in sorted(grids[module]):
            grid = grids[module][spec]
            key = f"{module.layer}.{module.kind}.{spec}m{spec.meta_group_size}"
            entries.append({"key": key, "module": asdict(module), "spec": asdict(spec), **_grid_layout(grid)})
            tensors |= {f"{key}.{name}": tensor.cpu().contiguous() for name, tensor in grid.to_tensors().items()}
    header = json.dumps({"format_version": _FORMAT_VERSION, "grids": entries}, sort_keys=True)
    save_file(tensors, path, metadata={_METADATA_KEY: header})


def _grid_layout(grid: Grid) -> dict[str, Any]:
    return {"shape": list(grid.shape), "axis": grid.axis}


def load_grids(path: Path) -> dict[ModuleId, dict[QuantSpec, Grid]]:
    """Read what `save_grids` wrote. Raises DamagedFile if it cannot be read."""
    grids: dict[ModuleId, dict[QuantSpec, Grid]] = {}
    try:
        with safe_open(path, "pt") as file:
            for entry in json.loads(file.metadata()[_METADATA_KEY])["grids"]:
                tensors = {name: file.get_tensor(f"{entry['key']}.{name}") for name in GRID_TENSORS}
                spec = QuantSpec(**entry["spec"])
                shape = (entry["shape"][0], entry["shape"][1])
                grid = Grid.from_tensors(tensors, spec, shape, entry["axis"])
                grids.setdefault(ModuleId(**entry["module"]), {})[spec] = grid
    except (SafetensorError, InputError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(
            f"{path} is not a readable file of grids: {error}; remove it, it will be made again"
        ) from error
    return grids
