"""The grids of every configuration for a layer's matrices: fitted, kept in one file, read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lmq.errors import DamagedFile, InputError
from lmq.formats.groups import GRID_TENSORS, Grid, encode
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId
from lmq.numerics import require_finite
from lmq.quantizers import Quantizer

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
