"""Figures of the studies: sensitivity profiles over one another, and cheap costs against the exact one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmq.report.figures.canvas import (
    Margins,
    layer_ticks,
    new_axes,
    number_text,
    put_text,
    put_title,
    scale_y,
    value_limits,
)
from lmq.report.figures.palette import INK, series_style
from lmq.report.study import CostPair, CostQuality, Profile, Setting

WIDTH_PX, PROFILE_PX = 680.0, 230.0
SCATTER_PX = 320.0
_LINE_PX, _NAME_PX = 17.0, 58.0
_MOST_TICKS = 5


def setting_names(settings: Sequence[Setting]) -> dict[Setting, str]:
    """What tells the settings apart: values of the dimensions in which they differ, or the model's name."""
    varied = [len(set(values)) > 1 for values in zip(*map(astuple, settings), strict=True)]
    return {
        setting: " · ".join(value for value, shown in zip(astuple(setting), varied, strict=True) if shown)
        or setting.model
        for setting in settings
    }


def sensitivity_figures(profiles: Mapping[Setting, Mapping[str, Profile]]) -> list[Figure]:
    """A legend, and for every part a panel with one line per setting, divided by its geometric mean."""
    names = setting_names(list(profiles))
    parts = dict.fromkeys(part for by_part in profiles.values() for part in by_part)
    return [_legend(list(names.values())), *(_part_panel(part, profiles) for part in parts)]


def _legend(names: Sequence[str]) -> Figure:
    height = 26 + _LINE_PX * len(names)
    margins = Margins(left=0, right=0, top=0, bottom=0)
    figure, axes = new_axes(WIDTH_PX, height, margins, f"settings: {', '.join(names)}")
    axes.set_axis_off()
    put_title(axes, "Activation sensitivity over its geometric mean over the layers, log scale")
    for index, name in enumerate(names):
        style = series_style(index)
        y_px = 34 + _LINE_PX * index
        put_text(axes, 0, y_px, style.glyph, color=style.colour.light)
        put_text(axes, 16, y_px, name, color=INK.light)
    return figure


def _part_panel(part: str, profiles: Mapping[Setting, Mapping[str, Profile]]) -> Figure:
    layers = max(len(by_part[part]) for by_part in profiles.values() if part in by_part)
    figure, axes = new_axes(
        WIDTH_PX, PROFILE_PX, Margins(left=52, right=12, top=26, bottom=24), f"{part}: sensitivity over {layers} layers"
    )
    put_title(axes, part)
    lines = [_over_mean(by_part.get(part, ())) for by_part in profiles.values()]
    shown = [value for line in lines for value in line if value > 0]
    scale_y(axes, *value_limits(shown, log=True), log=True)
    axes.set_xlim(-0.5, layers - 0.5)
    layer_ticks(axes, layers)
    for index, line in enumerate(lines):
        style = series_style(index)
        axes.plot(
            range(len(line)),
            line,
            color=style.colour.light,
            marker=style.marker,
            markersize=3.4,
            linewidth=1.3,
        )
    return figure


def _over_mean(profile: Profile) -> list[float]:
    """Values divided by their geometric mean, which one spike hardly moves; NaN where not measured or 0."""
    logarithms = [math.log(value) for value in profile if value]
    mean = math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan
    return [value / mean if value else math.nan for value in profile]


def cost_scatters(pairs: Sequence[CostPair], qualities: Sequence[CostQuality]) -> list[Figure]:
    """A panel per cheap cost, in the order of the qualities: exact cost against it, one colour per bit width.

    Both scales are logarithmic; pairs with a cost of 0 or less are not drawn.
    """
    widths = sorted({pair.spec.bits for pair in pairs})
    return [_scatter(quality, pairs, widths) for quality in qualities]


def _scatter(quality: CostQuality, pairs: Sequence[CostPair], widths: Sequence[int]) -> Figure:
    margins = Margins(left=58, right=14, top=58, bottom=40)
    figure, axes = new_axes(SCATTER_PX, SCATTER_PX, margins, f"measured divergence against {quality.cost}")
    put_title(axes, quality.cost)
    drawn = [pair for pair in pairs if pair.exact > 0 and pair.cheap[quality.cost] > 0]
    rho = "not defined" if quality.rho is None else f"{quality.rho:.3f}"
    put_text(axes, 0, 30, f"divergence in nats per token against it; ρ {rho}")
    if len(drawn) < len(pairs):
        put_text(axes, 0, 46, f"{len(pairs) - len(drawn)} pairs at 0 or below not drawn")
    if not drawn:
        axes.set_axis_off()
        return figure
    scale_y(axes, *value_limits([pair.exact for pair in drawn], log=True), log=True)
    _scale_x(axes, [pair.cheap[quality.cost] for pair in drawn])
    for index, bits in enumerate(widths):
        style = series_style(index)
        of_width = [pair for pair in drawn if pair.spec.bits == bits]
        axes.plot(
            [pair.cheap[quality.cost] for pair in of_width],
            [pair.exact for pair in of_width],
            linestyle="none",
            marker=style.marker,
            markersize=4.5,
            color=style.colour.light,
        )
        right_px = SCATTER_PX - margins.right - _NAME_PX * (len(widths) - 1 - index)
        put_text(axes, right_px, SCATTER_PX - 4, f"{style.glyph} {bits} bits", color=style.colour.light, ha="right")
    return figure


def _scale_x(axes: Axes, values: Sequence[float]) -> None:
    low, high = value_limits(values, log=True)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [10.0**decade for decade in decades[:: max(1, math.ceil(len(decades) / _MOST_TICKS))]]
    if len(ticks) < 2:
        ticks = sorted({min(values), max(values)})
    axes.set_xticks(ticks, labels=[number_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
