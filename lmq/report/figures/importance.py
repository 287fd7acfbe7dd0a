"""Importance metrics of the same layers under one another, each in a band of its own scale."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmq.report.figures.canvas import Margins, layer_ticks, new_axes, number_text, put_text, put_title
from lmq.report.figures.palette import INK, RULE, SERIES
from lmq.report.figures.profiles import LOG_RATIO

WIDTH_PX = 480.0
_BAND_PX, _NAME_PX, _GAP_PX = 48.0, 20.0, 10.0
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 58.0, 10.0, 26.0, 24.0


def importance_bands(
    metrics: Mapping[str, Sequence[float | None]], *, title: str, removed_layers: Collection[int] = ()
) -> Figure:
    """Every metric over the layers, from its smallest to its largest value; None leaves a gap.

    All metrics have one number per layer. A band is logarithmic, and says so, where its largest value is more than 20
    times its smallest. `removed_layers` are shaded through all bands.
    """
    layers = max(len(values) for values in metrics.values())
    inner_px = len(metrics) * (_NAME_PX + _BAND_PX + _GAP_PX)
    margins = Margins(left=_LEFT_PX, right=_RIGHT_PX, top=_TOP_PX, bottom=_BOTTOM_PX)
    label = f"{', '.join(metrics)} over {layers} layers: {title}"
    figure, axes = new_axes(WIDTH_PX, inner_px + _TOP_PX + _BOTTOM_PX, margins, label)
    put_title(axes, title)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(0, inner_px))
    layer_ticks(axes, layers)
    _shade(axes, removed_layers)
    ticks: dict[float, str] = {}
    for band, (name, values) in enumerate(metrics.items()):
        top_px = _TOP_PX + band * (_NAME_PX + _BAND_PX + _GAP_PX)
        bottom = inner_px + _TOP_PX - top_px - _NAME_PX - _BAND_PX
        scale, ends = _draw_band(axes, values, bottom)
        put_text(axes, _LEFT_PX, top_px + 14, f"{name}{scale}", color=INK.light)
        ticks |= ends
    axes.set_yticks(list(ticks), labels=list(ticks.values()))
    if removed_layers:
        put_text(axes, WIDTH_PX - _RIGHT_PX, 13, "shaded: removed layers", ha="right")
    return figure


def _draw_band(axes: Axes, values: Sequence[float | None], bottom: float) -> tuple[str, dict[float, str]]:
    """Draw one metric above height `bottom`; a remark for its name, and the ticks at its ends."""
    measured = [value for value in values if value is not None]
    axes.axhline(bottom, color=RULE.light, linewidth=1, zorder=0)
    if not measured:
        return " (not measured)", {}
    low, high = min(measured), max(measured)
    log = low > 0 and high / low > LOG_RATIO
    heights = [float("nan") if value is None else bottom + _BAND_PX * _share(value, low, high, log) for value in values]
    axes.plot(range(len(values)), heights, color=SERIES[0].light, linewidth=1.6, marker="o", markersize=2.6)
    ends = {
        bottom + _BAND_PX * _share(value, low, high, log): number_text(float(f"{value:.3g}")) for value in (low, high)
    }
    return " (log scale)" if log else "", ends


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Place of a value between the smallest (0) and the largest (1); the middle when they are the same."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _shade(axes: Axes, layers: Collection[int]) -> None:
    """Shade layers behind all bands, neighbours as one shape."""
    for _, run in groupby(enumerate(sorted(layers)), key=lambda item: item[1] - item[0]):
        neighbours = [layer for _, layer in run]
        axes.axvspan(
            neighbours[0] - 0.5, neighbours[-1] + 0.5, facecolor=RULE.light, edgecolor="none", linewidth=0, zorder=0
        )
