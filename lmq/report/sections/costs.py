"""What every module loses under every configuration, by each measurement of it: curves, the costliest, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import QuantSpec
from lmq.layers.importance.correlation import rank_correlations
from lmq.measurement.base import CostColumn
from lmq.measurement.registry import COSTS as REGISTERED
from lmq.model.structure import EMBEDDINGS, ModuleId
from lmq.outliers import FEWEST_LAYERS_OF_KIND, find_outlier_layers
from lmq.report.data import ModelReport
from lmq.report.figures.allocation_map import short_kind
from lmq.report.figures.palette import SERIES
from lmq.report.figures.profiles import cost_curves
from lmq.report.figures.svg import figure_svg
from lmq.report.html import (
    Cell,
    Column,
    csv_link,
    details,
    not_measured,
    number,
    panels,
    significant,
    slug,
    table,
    text,
)
from lmq.report.results import format_number, format_percent

MOST_PANELS = 12
"""Kinds drawn per measurement; a mixture of experts has hundreds, and the CSV has them all."""
MOST_MODULES = 12
"""Rows of the table of the costliest modules."""
MOST_VARIANTS = 6
"""Variants in that table: more would not fit paper."""
LIKELY_BITS = 4
"""Width at which costs are compared over modules: the one that most budgets are about."""


COSTS: Mapping[str, CostColumn] = {column.name: column for cost in REGISTERED.values() for column in cost.columns}
"""By their name in `ModelReport.costs`; the first that was measured leads."""


def costs_part(model: ModelReport) -> str:
    """Curves of the leading cost, the costliest modules, the other costs folded, and how well all agree."""
    measured = [name for name in COSTS if name in model.costs]
    lead_name = leading_cost(model)
    leads = [] if lead_name is None else [lead_name]
    title = COSTS["sequence_fisher"].title
    lead = [f"<h4>{title}</h4>{not_measured(title)}"]
    if leads:
        lead = [_curves(model, leads[0]), _costliest(model, leads[0])]
    others = [_folded(model, name) for name in measured if name not in leads]
    if "frobenius" not in measured:
        others.append(not_measured(COSTS["frobenius"].title))
    agreement = _agreement(model, measured)
    return "\n".join([*lead, *([agreement] if agreement else []), *others])


def leading_cost(model: ModelReport) -> str | None:
    """The loss-aware cost that was measured: by whole sequences, else by tokens."""
    return next((name for name in ("sequence_fisher", "fisher") if name in model.costs), None)


def one_per_width(specs: Sequence[QuantSpec]) -> list[QuantSpec]:
    """One configuration for every weight width, with the middle group size: enough to see the curves apart."""
    widths = sorted({spec.bits for spec in specs})
    same_width = [sorted((s for s in specs if s.bits == width), key=lambda s: s.group_size) for width in widths]
    return [group[len(group) // 2] for group in same_width]


def likely_spec(specs: Sequence[QuantSpec]) -> QuantSpec:
    """The drawn configuration whose width is nearest to 4 bits."""
    return min(one_per_width(specs), key=lambda spec: (abs(spec.bits - LIKELY_BITS), spec.bits))


def cost_outliers(costs: ErrorTable, spec: QuantSpec) -> dict[str, list[int]]:
    """Kind → layers at which the cost at `spec` jumps, by the rule of `lmq.outliers` on the ratio of neighbours.

    A kind in too few layers, or with a cost that nothing can be divided by, has none.
    """
    by_kind = {}
    column = costs.specs.index(spec)
    for kind in dict.fromkeys(module.kind for module in costs.modules):
        rows = [row for row, module in enumerate(costs.modules) if module.kind == kind]
        profile = costs.cost[rows, column]
        if len(rows) < FEWEST_LAYERS_OF_KIND or not np.isfinite(profile).all() or not profile.all():
            continue
        by_kind[kind] = [costs.modules[rows[i]].layer for i in find_outlier_layers(profile, difference="divide")]
    return by_kind


def cost_figures(model: ModelReport, name: str) -> list[Figure]:
    """Curves of one cost, a figure per kind, outlier layers ringed."""
    costs = model.costs[name]
    specs, ringed = one_per_width(costs.specs), likely_spec(costs.specs)
    outliers = cost_outliers(costs, ringed)
    kinds = _kinds(model, costs)
    return [
        cost_curves(
            costs,
            kind,
            specs=specs,
            layers=model.structure.layers,
            title=short_kind(kind, kinds),
            ringed=ringed,
            outlier_layers=outliers.get(kind, ()),
        )
        for kind in kinds[:MOST_PANELS]
    ]


def _name(module: ModuleId, model: ModelReport) -> str:
    if module.layer == EMBEDDINGS:
        return escape(module.kind)
    return f"layer {module.layer} {escape(short_kind(module.kind, model.structure.kinds))}"


def _kinds(model: ModelReport, costs: ErrorTable) -> list[str]:
    return [kind for kind in model.structure.kinds if any(module.kind == kind for module in costs.modules)]


def _curves(model: ModelReport, name: str) -> str:
    costs, about = model.costs[name], COSTS[name]
    specs, ringed = one_per_width(costs.specs), likely_spec(costs.specs)
    drawn = [figure_svg(one) for one in cost_figures(model, name)]
    header = ["layer", "kind", *(spec.name for spec in costs.specs)]
    rows = [
        (module.layer, module.kind, *(f"{value:.6g}" for value in row))
        for module, row in zip(costs.modules, costs.cost, strict=True)
    ]
    link = csv_link(f"{name.replace('_', '-')}-{slug(model.name)}.csv", header, rows)
    legend = "".join(
        f'<li><i class="line" style="background:{colour.css}"></i>{spec}</li>'
        for spec, colour in zip(specs, SERIES, strict=False)
    )
    rings = f" Rings: jumps from the layer before at {ringed}." if any(cost_outliers(costs, ringed).values()) else ""
    below = " Values of 0 and below are not drawn." if (costs.cost <= 0).any() else ""
    note = f"{about.meaning} Log scale.{rings}{below}"
    return panels(about.title, note, link, drawn, len(_kinds(model, costs)), f'<ul class="legend">{legend}</ul>')


def _folded(model: ModelReport, name: str) -> str:
    return details(COSTS[name].title, _curves(model, name))


def _costliest(model: ModelReport, name: str) -> str:
    """The modules that lose most at the likely configuration, and what every mixed variant gave them."""
    costs = model.costs[name]
    spec = likely_spec(costs.specs)
    column = costs.cost[:, costs.specs.index(spec)]
    total = float(column.sum())
    order = np.argsort(-column, kind="stable")[:MOST_MODULES]
    given = {label: _by_module(rows) for label, rows in model.allocations.items()}
    shown = [label for label, specs in given.items() if len(set(specs.values())) > 1][:MOST_VARIANTS]
    mixed = {label: given[label] for label in shown}
    columns = [
        Column("Module"),
        Column(f"Cost at {spec}", True),
        Column("Share", True, "of the sum over all modules"),
        *(Column(label, hint="configuration in this variant") for label in mixed),
    ]
    rows = []
    for row in order:
        module, cost = costs.modules[row], float(column[row])
        share = cost / total if total > 0 else None
        cells = [
            Cell(_name(module, model), str(module)),
            number(significant(cost), cost),
            number(format_percent(share), share),
        ]
        rows.append([*cells, *(text(str(specs[module]) if module in specs else None) for specs in mixed.values())])
    return table(columns, rows, f"The {len(rows)} modules of highest cost, and what the variants gave them")


def _by_module(rows: Sequence[Mapping[str, object]]) -> dict[ModuleId, QuantSpec]:
    return {
        ModuleId(row["layer"], row["kind"]): QuantSpec.from_row(row)  # type: ignore[arg-type]
        for row in rows
    }


def _agreement(model: ModelReport, measured: Sequence[str]) -> str:
    """Spearman's ρ over the modules between every two costs that have one configuration in common."""
    common = set.intersection(*(set(model.costs[name].specs) for name in measured)) if measured else set()
    modules = {model.costs[name].modules for name in measured}
    if len(measured) < 2 or not common or len(modules) != 1:
        return ""
    spec = likely_spec(sorted(common, key=lambda one: one.bits_per_weight))
    profiles = {name: model.costs[name].cost[:, model.costs[name].specs.index(spec)].tolist() for name in measured}
    correlations = rank_correlations(profiles)
    columns = [Column("Cost"), *(Column(COSTS[name].title, True) for name in measured)]
    rows = [
        [
            text(COSTS[name].title),
            *(number(format_number(value, 2), value) for value in (correlations[name][other] for other in measured)),
        ]
        for name in measured
    ]
    note = (
        f'<p class="note">Spearman’s ρ over the {len(next(iter(modules)))} modules at {spec}: '
        "1 is the same order, 0 none in common.</p>"
    )
    return table(columns, rows, "Do the costs agree?") + note
