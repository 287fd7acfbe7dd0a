"""Perplexity against size: what every variant of one model buys with its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmq.report.figures.canvas import Margins, new_axes, put_text, scale_y, value_limits
from lmq.report.figures.labels import CHARACTER_PX, LINE_PX, Box, Side, boxes_along, place_names
from lmq.report.figures.palette import INK, MUTED, SeriesStyle, series_style
from lmq.report.results import FULL_PRECISION, UNIFORM, VariantResult, format_number, full_precision_of

LEAST_SIZE_RANGE = 0.05
"""The size axis spans at least this share of its largest value."""


@dataclass(frozen=True)
class _Point:
    result: VariantResult
    size_mb: float
    perplexity: float
    low: float
    high: float

    @classmethod
    def of(cls, result: VariantResult) -> _Point:
        perplexity, stderr = result.perplexity or 0.0, result.perplexity_stderr or 0.0
        # a log scale has no place for 0: a bar longer than half the value is cut there
        low = max(perplexity - stderr, perplexity / 2)
        return cls(result, (result.size_bytes or 0) / 1e6, perplexity, low, perplexity + stderr)


def drawable(results: Sequence[VariantResult]) -> list[VariantResult]:
    """Quantized variants with both a size and a perplexity."""
    return [r for r in results if r.strategy != FULL_PRECISION and None not in (r.size_bytes, r.perplexity)]


def strategy_styles(results: Sequence[VariantResult]) -> dict[str, SeriesStyle]:
    """A style for every strategy but full precision and uniform, in order of first appearance."""
    names = dict.fromkeys(r.strategy for r in results if r.strategy not in (FULL_PRECISION, UNIFORM))
    return {name: series_style(index) for index, name in enumerate(names)}


def perplexity_by_size(
    results: Sequence[VariantResult],
    *,
    model: str,
    styles: Mapping[str, SeriesStyle],
    width_px: float = 900,
    height_px: float = 440,
) -> Figure:
    """Scatter of one model's variants on a log scale, error bars ± 1 standard error, full precision as a line.

    Uniform variants are joined by a grey line: a point below it beats uniform at its size. Names are placed
    where they overlap nothing; a name without room is left out. Variants without a size or perplexity are not drawn.
    """
    own = [result for result in results if result.model == model]
    margins = Margins(left=44, right=16, top=30, bottom=42)
    figure, axes = new_axes(width_px, height_px, margins, f"Perplexity against size, {model}")
    points = [_Point.of(result) for result in drawable(own)]
    if not points:
        put_text(axes, width_px / 2, height_px / 2, "not measured", ha="center")
        axes.set(xticks=[], yticks=[])
        return figure
    reference = full_precision_of(model, own)
    full = reference.perplexity if reference else None
    _scale_axes(axes, points, full)
    _draw_points(axes, points, styles)
    put_text(axes, 0, 13, "Perplexity, log scale: lower is better")
    put_text(axes, width_px - margins.right, height_px - 6, "Quantized matrices as stored, MB", ha="right")
    _name_points(axes, points, full)
    return figure


def _scale_axes(axes: Axes, points: Sequence[_Point], full: float | None) -> None:
    low, high = value_limits([point.size_mb for point in points], log=False, margin=0.1)
    # variants of one budget differ by a few bytes: do not magnify that
    widen = max(0.0, LEAST_SIZE_RANGE * high - (high - low)) / 2
    axes.set_xlim(low - widen, high + widen)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    ends = [end for point in points for end in (point.low, point.high)] + ([] if full is None else [full])
    scale_y(axes, *value_limits(ends, log=True), log=True, ticks=6)
    if full is not None:
        axes.axhline(full, color=INK.light, linewidth=1.2, linestyle=(0, (4, 3)))


def _draw_points(axes: Axes, points: Sequence[_Point], styles: Mapping[str, SeriesStyle]) -> None:
    line = _uniform(points)
    axes.plot([p.size_mb for p in line], [p.perplexity for p in line], color=MUTED.light, linewidth=1.2)
    for point in points:
        style = styles.get(point.result.strategy)
        colour = style.colour.light if style else MUTED.light
        marker = style.marker if style else "s"
        axes.plot([point.size_mb] * 2, [point.low, point.high], color=colour, linewidth=1.4)
        axes.plot([point.size_mb], [point.perplexity], marker=marker, markersize=8, markeredgewidth=0, color=colour)


def _uniform(points: Sequence[_Point]) -> list[_Point]:
    """The uniform variants by size."""
    return sorted((p for p in points if p.result.strategy == UNIFORM), key=lambda point: point.size_mb)


def _name_points(axes: Axes, points: Sequence[_Point], full: float | None) -> None:
    """Put each strategy's name beside its point, best perplexity first, where nothing lies underneath."""
    window = axes.get_window_extent()
    frame = Box(window.x0, window.y0, window.x1 + 12, window.y1)
    taken = [box for point in points for box in _marks(axes, point)] + list(boxes_along(_uniform_line(axes, points)))
    if full is not None:
        taken += _name_full_precision(axes, full, frame, taken)
    best_first = sorted(points, key=lambda point: point.perplexity)
    named = [(*_pixels(axes, p.size_mb, p.perplexity), p.result.strategy) for p in best_first]
    for name, place in place_names(named, frame=frame, taken=taken):
        _write(axes, place.x, place.y - 4, name, place.side)


def _name_full_precision(axes: Axes, full: float, frame: Box, taken: Sequence[Box]) -> list[Box]:
    """Name the line of full precision at its left end, or at its right where points are in the way."""
    text = f"full precision {format_number(full, 2)}"
    width = len(text) * CHARACTER_PX
    y = _pixels(axes, 0, full)[1]
    at_left = Box(frame.left, y, frame.left + width, y + LINE_PX + 4)
    at_right = Box(frame.right - 12 - width, y, frame.right - 12, y + LINE_PX + 4)
    free_left = not any(at_left.overlaps(box) for box in taken)
    _write(axes, at_left.left if free_left else at_right.right, y + 5, text, "left" if free_left else "right")
    return [at_left if free_left else at_right, Box(frame.left, y - 1, frame.right, y + 1)]


def _marks(axes: Axes, point: _Point) -> tuple[Box, Box]:
    """Boxes of the point's marker and of its error bar."""
    x, y = _pixels(axes, point.size_mb, point.perplexity)
    low, high = (_pixels(axes, point.size_mb, end)[1] for end in (point.low, point.high))
    return Box(x - 5, y - 5, x + 5, y + 5), Box(x - 1.5, low, x + 1.5, high)


def _uniform_line(axes: Axes, points: Sequence[_Point]) -> list[tuple[float, float]]:
    return [_pixels(axes, point.size_mb, point.perplexity) for point in _uniform(points)]


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def _write(axes: Axes, x: float, y: float, text: str, side: Side) -> None:
    """Text whose baseline is `y` pixels above the figure's lower edge."""
    height = axes.get_figure(root=True).get_size_inches()[1] * 72  # type: ignore[union-attr]
    put_text(axes, x, height - y, text, color=INK.light, ha=side)
