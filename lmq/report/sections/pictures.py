"""The report's figures as pictures, for places that show images and not pages."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lmq.formats.spec import QuantSpec
from lmq.measurement.registry import PROFILES
from lmq.model.structure import ModuleId
from lmq.report.data import ModelReport, ReportData
from lmq.report.figures.allocation_map import WIDTH_PX, allocation_map
from lmq.report.figures.canvas import Margins, new_axes, put_legend, put_title
from lmq.report.figures.palette import SERIES, ramp_colour
from lmq.report.figures.perplexity import drawable, perplexity_by_size, strategy_styles
from lmq.report.figures.profiles import title_panel
from lmq.report.figures.standalone import standalone_svg
from lmq.report.html import slug
from lmq.report.sections.costs import COSTS, MOST_PANELS, cost_figures, leading_cost, one_per_width
from lmq.report.sections.importance import importance_figure
from lmq.report.sections.reasons import profile_curves, profile_figure

MOST_MAPS = 8
"""Allocations drawn per model; those of one configuration throughout are not drawn."""
_COLUMNS = 3


def report_pictures(data: ReportData) -> dict[str, str]:
    """SVG files by their stem: perplexity against size, allocations, and what was measured of every model."""
    pictures: dict[str, str] = {}
    styles = strategy_styles(data.results)
    for model in data.models:
        own = [result for result in data.results if result.model == model.name]
        own_pictures: dict[str, str] = {}
        if drawable(own):
            own_pictures["perplexity"] = standalone_svg([perplexity_by_size(own, model=model.name, styles=styles)])
        mixed = [label for label in model.allocations if _is_mixed(model, label)]
        for label in mixed[:MOST_MAPS]:
            own_pictures[f"allocation-{slug(label)}"] = _allocation(model, label)
        own_pictures |= _measured(model)
        pictures |= {f"{slug(model.name)}-{name}": picture for name, picture in own_pictures.items()}
    return pictures


def _measured(model: ModelReport) -> dict[str, str]:
    pictures: dict[str, str] = {}
    if (cost := leading_cost(model)) is not None:
        specs = one_per_width(model.costs[cost].specs)
        entries = [("━", colour.light, str(spec)) for spec, colour in zip(specs, SERIES, strict=False)]
        pictures["cost"] = _grid(title_panel(COSTS[cost].title, entries), cost_figures(model, cost))
    for name, profile in PROFILES.items():
        curves = profile_curves(model, name)[:MOST_PANELS]
        if curves:
            panels = [profile_figure(model, curve, profile.title) for curve in curves]
            pictures[name] = _grid(title_panel(profile.title), panels)
    if model.layer_activity:
        pictures["importance"] = standalone_svg([importance_figure(model)])
    return pictures


def _is_mixed(model: ModelReport, label: str) -> bool:
    return len({(row["bits"], row["group_size"]) for row in model.allocations[label]}) > 1


def _grid(first: Figure, panels: Sequence[Figure]) -> str:
    return standalone_svg([first, *panels], columns=_COLUMNS)


def _allocation(model: ModelReport, label: str) -> str:
    rows = model.allocations[label]
    specs = {ModuleId(row["layer"], row["kind"]): QuantSpec.from_row(row) for row in rows}
    scale = sorted(set(specs.values()), key=lambda spec: spec.bits_per_weight)
    figure = allocation_map(
        specs,
        kinds=model.structure.kinds,
        layers=model.structure.layers,
        scale=scale,
        boosted={ModuleId(row["layer"], row["kind"]) for row in rows if row["boosted"]},
        label=f"Bits per weight, {label}",
    )
    return standalone_svg([_legend(label, scale), figure])


def _legend(title: str, scale: Sequence[QuantSpec]) -> Figure:
    figure, axes = new_axes(WIDTH_PX, 60, Margins(left=0, right=0, top=0, bottom=0), title)
    axes.set_axis_off()
    put_title(axes, title)
    entries = [("■", ramp_colour(rank, len(scale)).light, str(spec)) for rank, spec in enumerate(scale)]
    put_legend(axes, entries, top_px=34, width_px=WIDTH_PX)
    return figure
