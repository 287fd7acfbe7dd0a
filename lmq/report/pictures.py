"""The report's figures as pictures, for places that show images and not pages."""

from __future__ import annotations

from matplotlib.figure import Figure

from lmq.plots.allocation_map import allocation_map
from lmq.plots.perplexity import drawable, perplexity_by_size, strategy_styles
from lmq.quant_spec import QuantSpec
from lmq.report.data import ModelReport, ReportData
from lmq.report.html import slug
from lmq.report.reasons import profile_curves, profile_figure
from lmq.structure import ModuleId

MOST_MAPS = 8
"""Allocations drawn per model."""


def report_pictures(data: ReportData) -> dict[str, Figure]:
    """Figures by file stem: perplexity against size, allocations, and the profiles that have outlier layers."""
    pictures: dict[str, Figure] = {}
    styles = strategy_styles(data.results)
    for model in data.models:
        own = [result for result in data.results if result.model == model.name]
        if drawable(own):
            pictures[f"perplexity-{slug(model.name)}"] = perplexity_by_size(own, model=model.name, styles=styles)
        for label in list(model.allocations)[:MOST_MAPS]:
            pictures[f"allocation-{slug(model.name)}-{slug(label)}"] = _allocation(model, label)
        for signal, title, rows in (
            ("sensitivity", "Activation sensitivity", model.sensitivity),
            ("kurtosis", "Kurtosis of the weights", model.statistics),
        ):
            for curve in profile_curves(model, rows, signal):
                if curve.outlier_layers:
                    name = f"{signal}-{slug(model.name)}-{slug(curve.kinds[0])}"
                    pictures[name] = profile_figure(model, curve, title)
    return pictures


def _allocation(model: ModelReport, label: str) -> Figure:
    rows = model.allocations[label]
    specs = {ModuleId(row["layer"], row["kind"]): QuantSpec(row["bits"], row["group_size"]) for row in rows}
    return allocation_map(
        specs,
        kinds=model.structure.kinds,
        layers=model.structure.layers,
        scale=sorted(set(specs.values()), key=lambda spec: spec.bits_per_weight),
        boosted={ModuleId(row["layer"], row["kind"]) for row in rows if row["boosted"]},
        label=f"Bits per weight, {label}",
    )
