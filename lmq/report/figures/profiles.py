"""Curves over the layers of a model: one measured number per layer, or a cost per configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import QuantSpec
from lmq.report.figures.canvas import (
    TEXT_PX,
    Margins,
    layer_ticks,
    new_axes,
    put_legend,
    put_text,
    put_title,
    scale_y,
    value_limits,
)
from lmq.report.figures.palette import INK, SERIES

WIDTH_PX, HEIGHT_PX = 320.0, 190.0
LOG_RATIO = 20.0
"""A curve whose largest value is more than this many times its smallest is drawn on a log scale."""


def layer_curve(
    values: Sequence[float | None], *, title: str, quantity: str, outlier_layers: Collection[int] = ()
) -> Figure:
    """One number per layer, with outlier layers ringed and numbered; None leaves a gap in the curve."""
    figure, axes = _panel(title, f"{quantity} over {len(values)} layers: {title}")
    measured = [value for value in values if value is not None]
    if not measured:
        put_text(axes, WIDTH_PX / 2, HEIGHT_PX / 2, "not measured", ha="center")
        axes.set_yticks([])
        return figure
    _scale(axes, measured, len(values))
    heights = [float("nan") if value is None else value for value in values]
    axes.plot(range(len(values)), heights, color=SERIES[0].light, linewidth=1.6, marker="o", markersize=2.6)
    _ring(axes, {layer: heights[layer] for layer in outlier_layers if values[layer] is not None}, len(values))
    return figure


def cost_curves(
    table: ErrorTable,
    kind: str,
    *,
    specs: Sequence[QuantSpec],
    layers: int,
    title: str,
    ringed: QuantSpec | None = None,
    outlier_layers: Collection[int] = (),
) -> Figure:
    """Cost of the modules of one kind over the layers, one line per configuration, on a log scale.

    `outlier_layers` are ringed and numbered on the line of `ringed`. Costs of 0 and below leave a gap.
    """
    figure, axes = _panel(title, f"cost of {kind} over {layers} layers at {', '.join(map(str, specs))}")
    rows = [(row, module.layer) for row, module in enumerate(table.modules) if module.kind == kind]
    lines = {spec: [float(table.cost[row, table.specs.index(spec)]) for row, _ in rows] for spec in specs}
    positive = [value for line in lines.values() for value in line if value > 0]
    if not positive:
        put_text(axes, WIDTH_PX / 2, HEIGHT_PX / 2, "no cost above 0", ha="center")
        axes.set_yticks([])
        return figure
    scale_y(axes, *value_limits(positive, log=True), log=True)
    _scale_layers(axes, layers)
    for colour, (_, line) in zip(SERIES, lines.items(), strict=False):
        shown = [value if value > 0 else float("nan") for value in line]
        axes.plot([layer for _, layer in rows], shown, color=colour.light, linewidth=1.6)
    if ringed is not None:
        heights = {layer: value for (_, layer), value in zip(rows, lines[ringed], strict=True) if value > 0}
        _ring(axes, {layer: heights[layer] for layer in outlier_layers if layer in heights}, layers)
    return figure


def title_panel(title: str, entries: Sequence[tuple[str, str, str]] = ()) -> Figure:
    """A panel of the same size without axes: what the panels beside it show, and their legend (glyph, colour, name)."""
    figure, axes = _panel(title, title)
    axes.set_axis_off()
    put_legend(axes, entries, top_px=40, width_px=WIDTH_PX)
    return figure


def _panel(title: str, label: str) -> tuple[Figure, Axes]:
    figure, axes = new_axes(WIDTH_PX, HEIGHT_PX, Margins(left=46, right=12, top=28, bottom=24), label)
    put_title(axes, title)
    return figure, axes


def _scale(axes: Axes, measured: Sequence[float], layers: int) -> None:
    log = min(measured) > 0 and max(measured) / min(measured) > LOG_RATIO
    low, high = value_limits(measured, log=log, margin=0.12)
    scale_y(axes, low, high, log=log)
    _scale_layers(axes, layers)


def _scale_layers(axes: Axes, layers: int) -> None:
    axes.set_xlim(-0.5, layers - 0.5)
    layer_ticks(axes, layers)


def _ring(axes: Axes, heights: Mapping[int, float], layers: int) -> None:
    """A ring at every layer's height, with its number."""
    marked = sorted(heights)
    axes.plot(
        marked,
        [heights[layer] for layer in marked],
        linestyle="none",
        marker="o",
        markersize=8.5,
        markerfacecolor="none",
        markeredgecolor=INK.light,
        markeredgewidth=1.6,
    )
    for layer in marked:
        _mark(axes, layer, heights[layer], layers)


def _mark(axes: Axes, layer: int, value: float, layers: int) -> None:
    """The layer's number beside its ring, on the side where there is room."""
    left = layer > layers / 2
    axes.annotate(
        str(layer),
        (layer, value),
        xytext=(-8 if left else 8, -1),
        textcoords="offset pixels",
        ha="right" if left else "left",
        va="center",
        fontsize=TEXT_PX,
        family="sans-serif",
        weight="bold",
        color=INK.light,
    )
