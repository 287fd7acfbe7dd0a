"""Section 3: why the bits went there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from lmq.error_table import ErrorTable
from lmq.plots.allocation_map import short_kind
from lmq.plots.palette import SERIES
from lmq.plots.profiles import cost_curves, layer_curve
from lmq.plots.svg import figure_svg
from lmq.quant_spec import QuantSpec
from lmq.report.data import ModelReport, ReportData, Rows
from lmq.report.html import csv_link, details, not_measured, section, slug

MOST_PANELS = 12
"""Kinds drawn per measurement; a mixture of experts has hundreds, and the CSV has them all."""


def reasons_section(data: ReportData) -> str:
    """Kurtosis, sensitivity and cost over the layers, for every model."""
    several = len(data.models) > 1
    parts = [
        details(model.name, _model_part(model))
        if several and index
        else f"{_heading(model, several)}{_model_part(model)}"
        for index, model in enumerate(data.models)
    ]
    body = "\n".join(parts) if parts else not_measured("Measurements of the model")
    return section("reasons", "Why there?", body)


def _heading(model: ModelReport, several: bool) -> str:
    return f"<h3>{escape(model.name)}</h3>" if several else ""


def _model_part(model: ModelReport) -> str:
    return "\n".join(
        (
            *(f'<p class="warning">{escape(warning)}</p>' for warning in model.warnings),
            _profile(model, model.sensitivity, "sensitivity", "Activation sensitivity", _SENSITIVITY),
            _profile(model, model.kurtosis, "kurtosis", "Kurtosis of the weights", _KURTOSIS),
            _costs(model, model.fisher, "fisher", "Loss-aware cost", _FISHER),
            _costs(model, model.frobenius, "frobenius", "Frobenius error", _FROBENIUS),
        )
    )


_SENSITIVITY = (
    "Mean squared change of the output of a part when its weights are quantized; modules measured together share it."
)
_KURTOSIS = "Fourth moment over squared variance; a normal distribution has 3."
_FISHER = "Expected growth of the loss when one module is quantized, from gradients on the calibration text."
_FROBENIUS = "Norm of the difference between the weights and their quantized form; blind to what the weights do."


@dataclass(frozen=True)
class ProfileCurve:
    """One number per layer, shared by `kinds` (they were measured together), with its outlier layers."""

    kinds: tuple[str, ...]
    values: tuple[float | None, ...]
    outlier_layers: tuple[int, ...]


def profile_curves(model: ModelReport, rows: Rows, signal: str) -> list[ProfileCurve]:
    """The different curves of a signal; kinds with the same values share one."""
    values = {(row["kind"], row["layer"]): row[signal] for row in rows}
    outliers = _outliers(model, signal)
    curves: dict[tuple[tuple[float | None, ...], tuple[int, ...]], list[str]] = {}
    for kind in model.structure.kinds:
        if not any(key[0] == kind for key in values):
            continue
        curve = tuple(values.get((kind, layer)) for layer in range(model.structure.layers))
        marked = tuple(layer for layer in range(model.structure.layers) if (kind, layer) in outliers)
        curves.setdefault((curve, marked), []).append(kind)
    return [ProfileCurve(tuple(kinds), curve, marked) for (curve, marked), kinds in curves.items()]


def profile_figure(model: ModelReport, curve: ProfileCurve, title: str) -> Figure:
    """Figure of one curve, named by the kinds that share it."""
    names = ", ".join(short_kind(kind, model.structure.kinds) for kind in curve.kinds)
    return layer_curve(curve.values, title=names, quantity=title, outlier_layers=curve.outlier_layers)


def _outliers(model: ModelReport, signal: str) -> set[tuple[str, int]]:
    return {(r["kind"], r["layer"]) for r in model.outliers if r["signal"] == signal and r["outlier"]}


def _profile(model: ModelReport, rows: Rows, signal: str, title: str, meaning: str) -> str:
    if not rows:
        return f"<h4>{title}</h4>{not_measured(title)}"
    z_scores = {(r["kind"], r["layer"]): r["z"] for r in model.outliers if r["signal"] == signal}
    outliers = _outliers(model, signal)
    curves = profile_curves(model, rows, signal)
    panels = [figure_svg(profile_figure(model, curve, title)) for curve in curves[:MOST_PANELS]]
    header = ["kind", "layer", signal, "z", "outlier"]
    keyed = [((row["kind"], row["layer"]), row[signal]) for row in rows]
    data = [(*key, value, z_scores.get(key), key in outliers) for key, value in keyed]
    link = csv_link(f"{signal}-{slug(model.name)}.csv", header, data)
    rings = "Rings mark outlier layers." if outliers else "No outlier layers." if z_scores else ""
    return _panels(title, f"{meaning} {rings}", link, panels, len(curves))


def _costs(model: ModelReport, costs: ErrorTable | None, name: str, title: str, meaning: str) -> str:
    if costs is None:
        return f"<h4>{title}</h4>{not_measured(title)}"
    specs = one_per_width(costs.specs)
    kinds = [kind for kind in model.structure.kinds if any(module.kind == kind for module in costs.modules)]
    panels = [
        figure_svg(cost_curves(costs, kind, specs=specs, layers=model.structure.layers, title=short_kind(kind, kinds)))
        for kind in kinds[:MOST_PANELS]
    ]
    header = ["layer", "kind", *(spec.name for spec in costs.specs)]
    rows = [
        (module.layer, module.kind, *(f"{value:.6g}" for value in row))
        for module, row in zip(costs.modules, costs.cost, strict=True)
    ]
    link = csv_link(f"{name}-cost-{slug(model.name)}.csv", header, rows)
    legend = "".join(
        f'<li><i class="line" style="background:{colour.css}"></i>{spec}</li>'
        for spec, colour in zip(specs, SERIES, strict=False)
    )
    return _panels(title, f"{meaning} Log scale.", link, panels, len(kinds), f'<ul class="legend">{legend}</ul>')


def one_per_width(specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    """One configuration for every weight width, with the middle group size: enough to see the curves apart."""
    widths = sorted({spec.bits for spec in specs})
    same_width = [sorted((s for s in specs if s.bits == width), key=lambda s: s.group_size) for width in widths]
    return [group[len(group) // 2] for group in same_width]


def _panels(title: str, meaning: str, link: str, panels: Sequence[str], measured: int, legend: str = "") -> str:
    rest = f" {measured - len(panels)} more kinds are in the CSV." if measured > len(panels) else ""
    figures = "".join(f"<figure>{panel}</figure>" for panel in panels)
    return (
        f'<h4>{escape(title)}</h4><p class="note">{escape(meaning)}{rest} {link}</p>{legend}'
        f'<div class="panels">{figures}</div>'
    )
