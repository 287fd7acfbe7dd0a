"""What can be told of a weight matrix before anything is quantized: kurtosis, percentiles, and a grid it lies on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.measurement.base import LayerReplay, Profile, Row
from lmq.measurement.coarse_grid import find_coarse_grid
from lmq.model.structure import ModuleId
from lmq.numerics import finite_sum, require_finite
from lmq.tables import MODULE_FIELDS, TableSchema

_log = logging.getLogger(__name__)

PERCENTILES: Mapping[str, float] = {
    "percentile_0": 0.0,
    "percentile_99": 99.0,
    "percentile_99_9": 99.9,
    "percentile_99_99": 99.99,
    "percentile_100": 100.0,
}
"""Percentiles of |w| by their column."""

WEIGHT_STATISTICS_SCHEMA = TableSchema(
    "weight-statistics",
    2,
    pa.schema(
        [
            *MODULE_FIELDS,
            pa.field("parameters", pa.int64(), nullable=False),
            pa.field("kurtosis", pa.float64()),
            *(pa.field(column, pa.float64(), nullable=False) for column in PERCENTILES),
            pa.field("grid_bits", pa.int32()),
            pa.field("grid_group_size", pa.int32()),
        ]
    ),
)
"""`kurtosis` is null where all weights are equal, `grid_bits` and `grid_group_size` where there is no coarse grid."""

_CHUNK_ELEMENTS = 1 << 16
_SAMPLE_ELEMENTS = 1 << 16
_TAIL_START = 99.0
_CONSTANT_VARIANCE = 1e-26
"""Variance, relative to the squared mean, that the rounding of the mean alone can leave in a constant matrix."""


def weight_statistics(module: ModuleId, weight: Tensor) -> dict[str, Any]:
    """Row of `WEIGHT_STATISTICS_SCHEMA` for `weight` [out_features, in_features], of any float dtype.

    Raises NotFiniteError for a weight with NaN or infinity.
    """
    grid = find_coarse_grid(weight)
    return {
        "layer": module.layer,
        "kind": module.kind,
        "parameters": weight.numel(),
        "kurtosis": kurtosis(weight, str(module)),
        **magnitude_percentiles(weight, str(module)),
        "grid_bits": grid.bits if grid else None,
        "grid_group_size": grid.group_size if grid else None,
    }


def magnitude_percentiles(weight: Tensor, name: str = "the weight") -> dict[str, float]:
    """Exact percentiles of |w| over all elements, by column of `PERCENTILES`.

    Linear interpolation between neighbours, as numpy.percentile in float64. Only the largest elements are sorted.
    Raises NotFiniteError for NaN or infinity, InputError for an empty weight.
    """
    if not weight.numel():
        raise InputError(f"{name} of shape {list(weight.shape)} has no elements and so no percentiles")
    require_finite(weight, name)
    chunks = weight.detach().reshape(-1).split(_CHUNK_ELEMENTS)
    smallest = min(chunk.abs().amin().item() for chunk in chunks)
    tail = _sorted_tail(chunks, weight.numel())
    return {
        column: _interpolated(tail, weight.numel(), percentile) if percentile >= _TAIL_START else smallest
        for column, percentile in PERCENTILES.items()
    }


def scaled_profiles(profiles: Mapping[str, Mapping[int, float | None]]) -> dict[str, dict[int, float]]:
    """Every profile (kind → layer → number) scaled to 0…1 over the layers of its kind.

    0 where all are equal, and where a layer has no number.
    """
    return {kind: _scaled(profile) for kind, profile in profiles.items()}


def _scaled(profile: Mapping[int, float | None]) -> dict[int, float]:
    numbers = [value for value in profile.values() if value is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return {
        layer: 0.0 if value is None or low == high else (value - low) / (high - low) for layer, value in profile.items()
    }


def kurtosis(weight: torch.Tensor, name: str = "the weight") -> float | None:
    """Pearson kurtosis m4 / m2² of all elements, population moments: 3 for a normal distribution.

    `weight` of any shape and float dtype; moments are accumulated in float64, chunk by chunk.
    Equals scipy.stats.kurtosis(fisher=False, bias=True). Zhang et al. 2025 (arXiv 2503.06518), equation 11.
    None where all elements are equal, as in the zeros of a layer that was added to deepen a model: no kurtosis exists.
    Raises NotFiniteError for a weight with NaN or infinity.
    """
    elements = max(weight.numel(), 1)
    mean = finite_sum(weight, name) / elements
    buffer = torch.empty(_CHUNK_ELEMENTS, dtype=torch.float64, device=weight.device)
    second_sum = fourth_sum = 0.0
    for chunk in weight.detach().reshape(-1).split(_CHUNK_ELEMENTS):
        squares = buffer[: chunk.numel()]
        squares.copy_(chunk).sub_(mean).square_()
        second_sum += float(squares.sum())
        fourth_sum += float(squares.dot(squares))
    variance = second_sum / elements
    if variance <= _CONSTANT_VARIANCE * mean * mean:
        _log.warning(
            "%s has no kurtosis: its %d elements all equal %g; it is left out of the kurtosis profile",
            name,
            weight.numel(),
            mean,
        )
        return None
    return fourth_sum / elements / variance**2


def _sorted_tail(chunks: Sequence[Tensor], elements: int) -> Tensor:
    """The largest |values| of all chunks, rising: at least all from the percentile where the tail starts."""
    needed = elements - int(_position(elements, _TAIL_START))
    stride = elements // _SAMPLE_ELEMENTS | 1  # odd: not the same few columns of every row
    sample = torch.cat([chunk[::stride] for chunk in chunks]).abs()
    # twice as many as needed, so that the sample's own scatter leaves none out
    threshold = sample.topk(min(len(sample), 2 * needed * len(sample) // elements + 1)).values[-1]
    tail = _magnitudes_from(chunks, threshold)
    if len(tail) < needed:  # the sample did not represent the matrix
        tail = _magnitudes_from(chunks, torch.zeros_like(threshold))
    return tail.sort().values


def _magnitudes_from(chunks: Sequence[Tensor], threshold: Tensor) -> Tensor:
    magnitudes = (chunk.abs() for chunk in chunks)
    return torch.cat([sizes[sizes >= threshold] for sizes in magnitudes])


def _position(elements: int, percentile: float) -> float:
    """Fractional 0-based rank of a percentile."""
    return (elements - 1) * (percentile / 100)


def _interpolated(tail: Tensor, elements: int, percentile: float) -> float:
    position = _position(elements, percentile)
    below = int(position) - elements  # counted from the end, where all values and their tail agree
    share = position - int(position)
    low, high = tail[below].item(), tail[min(below + 1, -1)].item()
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def measure_weights(layer: LayerReplay) -> Iterator[Row]:
    """Kurtosis and percentiles of every weight matrix of one layer, and the coarse grid it already lies on."""
    for kind, weight in layer.stored_weights().items():
        yield weight_statistics(ModuleId(layer.layer, kind), weight)


KURTOSIS = Profile(
    name="kurtosis",
    title="Kurtosis of the weights",
    schema=WEIGHT_STATISTICS_SCHEMA,
    version=3,
    measure=measure_weights,
    meaning="Fourth moment over squared variance; a normal distribution has 3.",
    difference="subtract",
)
