"""Section 3: why the bits went there."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from lmq.measurement.base import Profile
from lmq.measurement.registry import PROFILES
from lmq.report.data import ModelReport, ReportData
from lmq.report.figures.allocation_map import short_kind
from lmq.report.figures.profiles import layer_curve
from lmq.report.figures.svg import figure_svg
from lmq.report.html import csv_link, details, not_measured, panels, section, slug
from lmq.report.sections.costs import MOST_PANELS, costs_part
from lmq.report.sections.importance import importance_part
from lmq.report.sections.weights import super_weights_part, weights_part


def reasons_section(data: ReportData) -> str:
    """What was measured of every model: costs, sensitivity, kurtosis, importance, super weights, percentiles."""
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
            costs_part(model),
            *(_profile(model, profile) for profile in PROFILES.values()),
            importance_part(model),
            super_weights_part(model),
            weights_part(model),
        )
    )


@dataclass(frozen=True)
class ProfileCurve:
    """One number per layer, shared by `kinds` (they were measured together), with its outlier layers."""

    kinds: tuple[str, ...]
    values: tuple[float | None, ...]
    outlier_layers: tuple[int, ...]


def profile_curves(model: ModelReport, signal: str) -> list[ProfileCurve]:
    """The different curves of a signal; kinds with the same values share one."""
    rows = model.profiles.get(signal, ())
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


def _profile(model: ModelReport, profile: Profile) -> str:
    signal, title = profile.name, profile.title
    rows = model.profiles.get(signal, ())
    if not rows:
        return f"<h4>{title}</h4>{not_measured(title)}"
    z_scores = {(r["kind"], r["layer"]): r["z"] for r in model.outliers if r["signal"] == signal}
    outliers = _outliers(model, signal)
    curves = profile_curves(model, signal)
    drawn = [figure_svg(profile_figure(model, curve, title)) for curve in curves[:MOST_PANELS]]
    header = ["kind", "layer", signal, "z", "outlier"]
    keyed = [((row["kind"], row["layer"]), row[signal]) for row in rows]
    data = [(*key, value, z_scores.get(key), key in outliers) for key, value in keyed]
    link = csv_link(f"{signal}-{slug(model.name)}.csv", header, data)
    rings = "Rings mark outlier layers." if outliers else "No outlier layers." if z_scores else ""
    return panels(title, f"{profile.meaning} {rings}", link, drawn, len(curves))
