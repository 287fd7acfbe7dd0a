"""The frontier: predicted cost against size with uniform models above it, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmq.allocation.frontier import FrontierPoint
from lmq.formats.spec import QuantSpec
from lmq.report.figures.canvas import Margins, new_axes, put_legend, put_text, put_title, scale_y, value_limits
from lmq.report.figures.labels import Box, boxes_along, place_names
from lmq.report.figures.palette import INK, MUTED, SERIES, SeriesStyle
from lmq.report.figures.perplexity import drawable, strategy_styles
from lmq.report.results import UNIFORM, VariantResult, full_precision_of

WIDTH_PX, PREDICTED_PX, MEASURED_PX = 860.0, 340.0, 240.0


@dataclass(frozen=True, kw_only=True)
class _Value:
    """One measured value of a variant."""

    strategy: str
    size_mb: float
    value: float
    stderr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Page:
    """What the panels share: the model's name, the size axis, and a style for every strategy."""

    model: str
    limits_mb: tuple[float, float]
    styles: Mapping[str, SeriesStyle]

    def panel(self, title: str, height_px: float, *, is_last: bool) -> tuple[Figure, Axes]:
        """A panel with its title; the last one names the size axis."""
        margins = Margins(left=58, right=16, top=58, bottom=42 if is_last else 26)
        figure, axes = new_axes(WIDTH_PX, height_px, margins, f"{self.model}: {title}")
        put_title(axes, f"{self.model}: {title}")
        axes.set_xlim(*self.limits_mb)
        axes.ticklabel_format(axis="x", useOffset=False, style="plain")
        if is_last:
            text = "Quantized matrices as stored, MB"
            put_text(axes, WIDTH_PX - margins.right, height_px - 6, text, ha="right")
        return figure, axes

    def used(self, items: Sequence[_Value]) -> list[tuple[str, str, str]]:
        """Glyph, colour and name of every strategy among the items, in the order of the styles."""
        there = {item.strategy for item in items}
        return [(style.glyph, style.colour.light, name) for name, style in self.styles.items() if name in there]


def frontier_figures(
    points: Sequence[FrontierPoint],
    uniform: Mapping[QuantSpec, FrontierPoint],
    results: Sequence[VariantResult],
    *,
    model: str,
    strategy: str,
    costs_are_divergences: bool,
) -> list[Figure]:
    """Panels over one size axis: predicted cost of `strategy`, measured divergence, measured rise of log-perplexity.

    `results` are those of `model`. When `costs_are_divergences` (nats per token) the measured divergences stand beside
    the predicted costs, hollow, in one panel. A panel with nothing measured is left out.
    """
    divergences, rises = _divergences(results), _log_perplexity_rises(results)
    sizes_mb = [point.size_bytes / 1e6 for point in (*points, *uniform.values())]
    sizes_mb += [item.size_mb for item in (*divergences, *rises)]
    page = _Page(
        model=model,
        limits_mb=value_limits(sizes_mb, log=False, margin=0.03),
        styles={UNIFORM: SeriesStyle(MUTED, "s", "■"), **strategy_styles(results)},
    )
    measured = {"measured rise of log-perplexity, nats per token": rises}
    if not costs_are_divergences:
        measured = {"measured divergence from full precision, nats per token": divergences, **measured}
    titles = [title for title, items in measured.items() if items]
    unit = ", nats per token" if costs_are_divergences else ""
    title = f"predicted cost of {strategy}{unit}: lower is better"
    beside = divergences if costs_are_divergences else []
    figures = [_predicted_panel(page, title, points, uniform, beside, is_last=not titles)]
    figures += [_measured_panel(page, title, measured[title], is_last=title == titles[-1]) for title in titles]
    return figures


def _divergences(results: Sequence[VariantResult]) -> list[_Value]:
    return [
        _Value(
            strategy=result.strategy,
            size_mb=(result.size_bytes or 0) / 1e6,
            value=result.kl_divergence,
            stderr=result.kl_divergence_stderr or 0.0,
        )
        for result in drawable(results)
        if result.kl_divergence is not None
    ]


def _log_perplexity_rises(results: Sequence[VariantResult]) -> list[_Value]:
    """ln(perplexity / perplexity of full precision), without bars: both are measured on the same text."""
    quantized = drawable(results)
    reference = full_precision_of(quantized[0].model, results) if quantized else None
    if reference is None or reference.perplexity is None:
        return []
    full = reference.perplexity
    return [
        _Value(
            strategy=result.strategy,
            size_mb=(result.size_bytes or 0) / 1e6,
            value=math.log(result.perplexity / full),
        )
        for result in quantized
        if result.perplexity is not None
    ]


def _predicted_panel(
    page: _Page,
    title: str,
    points: Sequence[FrontierPoint],
    uniform: Mapping[QuantSpec, FrontierPoint],
    measured: Sequence[_Value],
    *,
    is_last: bool,
) -> Figure:
    """The curve, a square per uniform configuration with its name, and measured divergences as hollow markers."""
    figure, axes = page.panel(title, PREDICTED_PX, is_last=is_last)
    # a cost of 0, of weights that a configuration reproduces, has no place on a log scale
    line = [(point.size_bytes / 1e6, point.objective) for point in points if point.objective > 0]
    squares = [(point.size_bytes / 1e6, point.objective, spec.name) for spec, point in uniform.items()]
    squares = [square for square in squares if square[1] > 0]
    _scale(axes, [y for _, y in line] + [y for _, y, _ in squares] + [item.value for item in measured])
    axes.plot([x for x, _ in line], [y for _, y in line], color=SERIES[0].light, linewidth=1.8)
    _draw(axes, measured, page.styles, is_hollow=True)
    for x, y, _ in squares:
        axes.plot([x], [y], marker="s", markersize=6, markeredgewidth=0, color=MUTED.light)
    _name(axes, squares, [*boxes_along([_pixels(axes, *place) for place in line]), *_boxes(axes, measured)])
    legend = [("—", SERIES[0].light, "least predicted"), ("■", MUTED.light, "uniform, predicted")]
    hollow = [(_HOLLOW[glyph], colour, f"{name}, measured") for glyph, colour, name in page.used(measured)]
    put_legend(axes, legend + hollow, top_px=31, width_px=WIDTH_PX)
    return figure


def _measured_panel(page: _Page, title: str, items: Sequence[_Value], *, is_last: bool) -> Figure:
    figure, axes = page.panel(title, MEASURED_PX, is_last=is_last)
    _scale(axes, [item.value for item in items])
    _draw(axes, items, page.styles, is_hollow=False)
    put_legend(axes, page.used(items), top_px=31, width_px=WIDTH_PX)
    return figure


_HOLLOW = {"●": "○", "▲": "△", "◆": "◇", "▼": "▽", "✚": "✚", "■": "□"}


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A log scale, or a linear one where something is not above 0."""
    log = min(values, default=0.0) > 0
    scale_y(axes, *value_limits(values or [0.0], log=log, margin=0.1), log=log, ticks=6)


def _draw(axes: Axes, items: Sequence[_Value], styles: Mapping[str, SeriesStyle], *, is_hollow: bool) -> None:
    for item in items:
        style = styles[item.strategy]
        low = max(item.value - item.stderr, item.value / 2) if item.value > 0 else item.value - item.stderr
        axes.plot([item.size_mb] * 2, [low, item.value + item.stderr], color=style.colour.light, linewidth=1.2)
        axes.plot(
            [item.size_mb],
            [item.value],
            linestyle="none",
            marker=style.marker,
            markersize=7.5,
            markerfacecolor="none" if is_hollow else style.colour.light,
            markeredgecolor=style.colour.light,
            markeredgewidth=1.4 if is_hollow else 0,
        )


def _name(axes: Axes, points: Sequence[tuple[float, float, str]], taken: Sequence[Box]) -> None:
    """Names beside points, where nothing lies underneath."""
    places = [(*_pixels(axes, x, y), name) for x, y, name in points]
    window = axes.get_window_extent()
    frame = Box(window.x0, window.y0, window.x1 + 12, window.y1)
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y, _ in places]
    height = axes.get_figure(root=True).get_size_inches()[1] * 72  # type: ignore[union-attr]
    for name, place in place_names(places, frame=frame, taken=[*taken, *marks]):
        put_text(axes, place.x, height - place.y + 4, name, color=INK.light, ha=place.side)


def _boxes(axes: Axes, items: Sequence[_Value]) -> list[Box]:
    centres = [_pixels(axes, item.size_mb, item.value) for item in items]
    return [Box(x - 5, y - 5, x + 5, y + 5) for x, y in centres]


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)
