"""Outlier layers: where a profile over the layers jumps (SensiBoost and KurtBoost, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lmq.errors import InputError, unknown_name
from lmq.model.structure import ModuleId
from lmq.tables import MODULE_FIELDS, TableSchema

OUTLIERS_SCHEMA = TableSchema(
    "outliers",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            pa.field("signal", pa.string(), nullable=False),
            pa.field("z", pa.float64()),
            pa.field("outlier", pa.bool_(), nullable=False),
        ]
    ),
)

DIFFERENCES = ("subtract", "divide")
Z_THRESHOLD = 3.0
TRIM = (0.05, 0.05)
FEWEST_LAYERS = 3
"""Two differences are the fewest that have a standard deviation."""
FEWEST_LAYERS_OF_KIND = 4
"""A kind in fewer layers has no outliers: three differences are needed to tell one from two."""
ROUNDING = 16 * np.finfo(np.float64).eps
"""A spread below this, relative to the values that were subtracted or divided, is float64 rounding and counts as 0."""


def find_outlier_layers(profile: Sequence[float] | np.ndarray, *, difference: str, top_m: int = 0) -> list[int]:
    """Find the layers at which a profile [layers] jumps, by descending |z|.

    `difference` between neighbours is `subtract` (kurtosis) or `divide` (sensitivity, which rises with depth). A layer
    is an outlier if the z score of its difference to the layer before is strictly above 3; `top_m` keeps the first
    so many, 0 keeps all. Published behaviour: layer 0 can never be chosen, and one spike under `subtract` also flags
    the layer after it, the way down. Source: Zhang et al. 2025 (arXiv 2503.06518), algorithm 1.
    Raises InputError for a profile of fewer than 3 layers, values that are not finite, or a division by zero.
    """
    return _above_threshold(layer_z_scores(profile, difference), top_m)


def layer_z_scores(profile: Sequence[float] | np.ndarray, difference: str) -> np.ndarray:
    """Return |z| [layers] float64 of each layer's difference to the layer before; NaN for layer 0, which has none.

    Mean and standard deviation (ddof 1) are those of the differences without the 5% at either end, as in
    `scipy.stats.mstats`. Without spread every score is 0. Raises InputError as `find_outlier_layers` does.
    """
    from scipy.stats import mstats  # takes seconds to import

    values = _checked_profile(profile)
    if difference not in DIFFERENCES:
        raise unknown_name("difference", difference, DIFFERENCES)
    if difference == "divide":
        if not values[:-1].all():
            layer = int(np.flatnonzero(values[:-1] == 0)[0])
            raise InputError(f"layer {layer} of the profile is 0, which nothing can be divided by; use 'subtract'")
        differences = values[1:] / values[:-1]
        magnitude = np.abs(differences).max()
    else:
        differences = np.diff(values)
        magnitude = np.abs(values).max()
    spread = float(mstats.trimmed_std(differences, limits=TRIM, ddof=1))
    scores = np.zeros(len(values))
    if spread > ROUNDING * magnitude:
        scores[1:] = np.abs(differences - float(mstats.trimmed_mean(differences, limits=TRIM))) / spread
    scores[0] = np.nan
    return scores


def profiles_by_kind(values: Mapping[ModuleId, float | None]) -> dict[str, dict[int, float | None]]:
    """Arrange one number per module as kind → layer → number, layers rising; None is a module that has none."""
    profiles: dict[str, dict[int, float | None]] = {}
    for module in sorted(values):
        profiles.setdefault(module.kind, {})[module.layer] = values[module]
    return profiles


def outlier_modules(
    profiles: Mapping[str, Mapping[int, float | None]], *, difference: str, top_m: int = 0
) -> dict[str, list[int]]:
    """Find the outlier layers of every module kind: kind → layers, by descending |z|.

    `profiles` is kind → layer → number. Neighbours are the layers that have a number: what has none (a constant matrix
    has no kurtosis), or has 0 where numbers are divided (a matrix of zeros is exact in every configuration), is left
    out and no outlier. A kind in fewer than 4 such layers has no outliers. Raises InputError naming the kind whose
    profile cannot be used.
    """
    return {
        kind: [layers[index] for index in _above_threshold(scores, top_m)]
        for kind, (layers, scores) in _scores_by_kind(profiles, difference).items()
    }


def outlier_rows(values: Mapping[ModuleId, float | None], signal: str, *, difference: str) -> list[dict[str, Any]]:
    """Rows of `OUTLIERS_SCHEMA`, one per module: |z| of its layer within its kind, None where there is none."""
    return [
        {
            "layer": layer,
            "kind": kind,
            "signal": signal,
            "z": None if np.isnan(score) else float(score),
            "outlier": bool(score > Z_THRESHOLD),
        }
        for kind, (layers, scores) in _scores_by_kind(profiles_by_kind(values), difference).items()
        for layer, score in zip(layers, scores, strict=True)
    ]


def check_top_m(top_m: int) -> None:
    """Raise InputError for a negative number of layers to keep."""
    if top_m < 0:
        raise InputError(f"top_m = {top_m} is negative; give the number of layers to keep, or 0 for all")


def _scores_by_kind(
    profiles: Mapping[str, Mapping[int, float | None]], difference: str
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Kind → its layers, rising, and |z| of each; NaN where a layer is left out, and in a kind of too few layers."""
    scores = {}
    for kind, profile in profiles.items():
        layers = sorted(profile)
        values = np.array([profile[layer] for layer in layers], dtype=np.float64)  # None becomes NaN
        taken = np.array([profile[layer] is not None for layer in layers], dtype=bool)
        if difference == "divide":
            taken &= values != 0
        found = np.full(len(layers), np.nan)
        if taken.sum() >= FEWEST_LAYERS_OF_KIND:
            try:
                found[taken] = layer_z_scores(values[taken], difference)
            except InputError as error:
                raise InputError(f"profile of {kind}: {error}") from error
        scores[kind] = (layers, found)
    return scores


def _above_threshold(scores: np.ndarray, top_m: int) -> list[int]:
    """Positions with a score strictly above the threshold, the largest first."""
    check_top_m(top_m)
    above = sorted(np.flatnonzero(scores > Z_THRESHOLD).tolist(), key=lambda position: -scores[position])
    return above[:top_m] if top_m else above


def _checked_profile(profile: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(profile, dtype=np.float64)
    if values.ndim != 1 or len(values) < FEWEST_LAYERS:
        raise InputError(
            f"a profile of shape {values.shape} is too short; give one number per layer, at least {FEWEST_LAYERS}"
        )
    if not np.isfinite(values).all():
        layer = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(
            f"layer {layer} of the profile is {values[layer]}; measure it again, every layer needs a number"
        )
    return values
