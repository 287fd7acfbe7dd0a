"""Figures and axes measured in pixels, with the look that every figure of the project shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from lmq.report.figures.labels import CHARACTER_PX, LINE_PX
from lmq.report.figures.palette import INK, MUTED, RULE

TEXT_PX = 11.0
TITLE_PX = 12.5


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Space around the axes in pixels."""

    left: float
    right: float
    top: float
    bottom: float


def new_axes(width_px: float, height_px: float, margins: Margins, label: str) -> tuple[Figure, Axes]:
    """A transparent figure at 72 dpi (1 unit = 1 pixel) with one axes; `label` is its accessible name."""
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, facecolor="none", edgecolor="none", linewidth=0)
    figure.set_label(label)
    inner = (
        margins.left / width_px,
        margins.bottom / height_px,
        (width_px - margins.left - margins.right) / width_px,
        (height_px - margins.top - margins.bottom) / height_px,
    )
    axes = figure.add_axes(inner, facecolor="none")
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=RULE.light, linewidth=1)
    axes.tick_params(
        which="both", length=0, labelsize=TEXT_PX, labelcolor=MUTED.light, pad=5, labelfontfamily="sans-serif"
    )
    axes.set_axisbelow(True)
    axes.grid(False)
    return figure, axes


def put_text(axes: Axes, x_px: float, y_px: float, text: str, **style: Any) -> None:
    """Text at pixels from the figure's top left corner."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches() * 72
    options: dict[str, Any] = {
        "color": MUTED.light,
        "fontsize": TEXT_PX,
        "family": "sans-serif",
        "va": "baseline",
    } | style
    axes.text(x_px / width, 1 - y_px / height, text, transform=figure.transFigure, **options)


def put_title(axes: Axes, text: str) -> None:
    """Title at the figure's top left."""
    put_text(axes, 0, 13, text, color=INK.light, fontsize=TITLE_PX, weight="bold")


def put_legend(axes: Axes, entries: Sequence[tuple[str, str, str]], *, top_px: float, width_px: float) -> None:
    """Glyphs in their colours with names (glyph, colour, name), from `top_px` down in lines of at most `width_px`."""
    x, y = 0.0, top_px
    for glyph, colour, name in entries:
        needed = 30 + len(name) * CHARACTER_PX * 0.9
        if x + needed > width_px and x > 0:
            x, y = 0.0, y + LINE_PX
        put_text(axes, x, y, glyph, color=colour)
        put_text(axes, x + 15, y, name)
        x += needed


def scale_y(axes: Axes, low: float, high: float, *, log: bool, ticks: int = 4) -> None:
    """Set the limits and put about `ticks` round ticks with a rule behind each; `log` needs `low` > 0."""
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(low, high)
    positions = _log_ticks(low, high, ticks) if log else _linear_ticks(low, high, ticks)
    axes.yaxis.set_major_locator(FixedLocator(positions))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(positions, labels=[number_text(position) for position in positions])
    axes.grid(True, axis="y", color=RULE.light, linewidth=1)


def layer_ticks(axes: Axes, layers: int) -> None:
    """Ticks at about six round layer numbers and the last, and the word "layer" before them."""
    step = next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, 1000) if layers / step <= 7)
    ticks = [layer for layer in range(0, layers, step) if layer == 0 or layers - 1 - layer >= step * 0.6]
    ticks = sorted({*ticks, layers - 1})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.annotate(
        "layer",
        (0, 0),
        xycoords="axes fraction",
        xytext=(-6, -5),
        textcoords="offset pixels",
        ha="right",
        va="top",
        fontsize=axes.xaxis.get_ticklabels()[0].get_fontsize(),
        family="sans-serif",
        color=MUTED.light,
    )


def number_text(value: float) -> str:
    """A tick's number: plain where short, else as 3e−7."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.6f}".rstrip("0").rstrip(".").replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def _linear_ticks(low: float, high: float, ticks: int) -> list[float]:
    positions = MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{position:.10g}") for position in positions if low <= position <= high]


def _log_ticks(low: float, high: float, ticks: int) -> list[float]:
    """Round numbers inside the limits: 1, 2, 5 of each decade, fewer when there are many, linear when few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        positions = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = [float(f"{position:.10g}") for position in positions if low <= position <= high]
        if len(inside) <= ticks + 1:
            break
    if len(inside) > ticks + 1:
        inside = inside[:: math.ceil(len(inside) / ticks)]
    return inside if len(inside) >= 3 else _linear_ticks(low, high, ticks)


def value_limits(values: Sequence[float], *, log: bool, margin: float = 0.08) -> tuple[float, float]:
    """Limits that leave a share `margin` of the range free on both sides."""
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    space = (high - low) * margin or abs(high) * 0.05 or 0.5
    low, high = low - space, high + space
    return (10**low, 10**high) if log else (low, high)
