"""The Frobenius error table of MXQ: the norm of the difference between weights and what they are rounded to."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch

from lmq.formats import Format
from lmq.formats.coded_grid import EncodedMatrix
from lmq.formats.groups import Grid, group_blocks, nearest_codes, to_groups
from lmq.measurement.base import Cost, CostColumn, cost_schema

FROBENIUS_SCHEMA = cost_schema(
    "frobenius",
    1,
    pa.field("frobenius_error", pa.float64(), nullable=False),
    pa.field("frobenius_norm", pa.float64(), nullable=False),
)


def frobenius_norm(weight: torch.Tensor) -> float:
    """‖W‖_F, accumulated in float64."""
    blocks = weight.detach().reshape(-1).split(1 << 16)
    return sum(_square_sum(block) for block in blocks) ** 0.5


def frobenius_errors(weight: torch.Tensor, rounded_to: Sequence[EncodedMatrix | Format]) -> list[float]:
    """‖W − Ŵ‖_F of each grid, Ŵ being what the checkpoint will hold, or of a format; accumulated in float64."""
    return [_frobenius_error(weight, item) for item in rounded_to]


def _frobenius_error(weight: torch.Tensor, rounded_to: EncodedMatrix | Format) -> float:
    if type(rounded_to) is Grid:  # codes of a CodedGrid are not the nearest ones
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


FROBENIUS = Cost(
    name="frobenius",
    title="Frobenius error",
    schema=FROBENIUS_SCHEMA,
    columns=(
        CostColumn(
            name="frobenius",
            label="squared Frobenius norm",
            column="frobenius_error",
            title="Frobenius error",
            meaning="Norm of the difference between the weights and their quantized form; "
            "blind to what the weights do.",
            squared=True,
        ),
    ),
)
"""Measured beside the grids, by their stage."""
