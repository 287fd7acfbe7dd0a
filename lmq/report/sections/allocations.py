"""Section 2: where did the bits go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from lmq.allocation.solver import PROVEN_GAP
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId, without_number
from lmq.report.data import ModelReport, ReportData, Rows
from lmq.report.figures.allocation_map import allocation_map, difference_map, short_kind
from lmq.report.figures.palette import DIVERGING, ramp_colour
from lmq.report.figures.svg import figure_svg
from lmq.report.html import Cell, Column, csv_link, details, figure, not_measured, number, section, slug, table
from lmq.report.results import UNIFORM, VariantResult, format_bytes, format_number, format_percent
from lmq.report.sections.chooser import difference_chooser

OPEN_MAPS = 6
"""Variants whose maps are shown at once; the rest are folded, one by one."""

Allocation = Mapping[ModuleId, QuantSpec]


def allocations_section(data: ReportData) -> str:
    """Maps of bits per weight per variant and their difference to uniform, and means per kind."""
    parts = [_model_part(model, data, named=len(data.models) > 1) for model in data.models if model.allocations]
    body = "\n".join(parts) if parts else not_measured("Allocations")
    return section("allocations", "Where did the bits go?", body)


def _model_part(model: ModelReport, data: ReportData, *, named: bool) -> str:
    allocations = {label: _as_specs(rows) for label, rows in model.allocations.items()}
    results = {result.label: result for result in data.results if result.model == model.name}
    scale = sorted({spec for specs in allocations.values() for spec in specs.values()}, key=_bits)
    mixed = [label for label, specs in allocations.items() if len(set(specs.values())) > 1]
    same = [label for label in allocations if label not in mixed]
    heading = f"<h3>{escape(model.name)}</h3>" if named else ""
    maps = [_maps(model, label, allocations, results, scale) for label in mixed]
    folded = "".join(details(label, html) for label, html in zip(mixed[OPEN_MAPS:], maps[OPEN_MAPS:], strict=True))
    flat = ", ".join(f"{label} ({next(iter(allocations[label].values()))})" for label in same if allocations[label])
    note = f'<p class="note">The same configuration for every module, so no map: {escape(flat)}.</p>' if flat else ""
    kept = (*model.structure.kept_notes, *model.structure.kept_beside)
    note += "".join(f'<p class="note">Kept as it is: {escape(what)}.</p>' for what in kept)
    legend = _legend(scale, any(row["boosted"] for rows in model.allocations.values() for row in rows))
    chooser = difference_chooser(model.structure, allocations, scale)
    return f"{heading}{legend}{''.join(maps[:OPEN_MAPS])}{folded}{note}{chooser}{_kind_table(model, allocations)}"


def _as_specs(rows: Rows) -> dict[ModuleId, QuantSpec]:
    return {ModuleId(row["layer"], row["kind"]): QuantSpec.from_row(row) for row in rows}


def _bits(spec: QuantSpec) -> float:
    return spec.bits_per_weight


def _maps(
    model: ModelReport,
    label: str,
    allocations: Mapping[str, Allocation],
    results: Mapping[str, VariantResult],
    scale: Sequence[QuantSpec],
) -> str:
    kinds, layers = model.structure.kinds, model.structure.layers
    allocation, rows = allocations[label], model.allocations[label]
    boosted = {ModuleId(row["layer"], row["kind"]) for row in rows if row["boosted"]}
    bits = allocation_map(
        allocation, kinds=kinds, layers=layers, scale=scale, boosted=boosted, label=f"Bits per weight, {label}"
    )
    against, differences = _differences(label, allocations, results)
    change = difference_map(
        differences, kinds=kinds, layers=layers, label=f"Bits per weight of {label} compared with {against}"
    )
    link = _csv(f"allocation-{slug(model.name)}-{slug(label)}.csv", rows)
    facts = _facts(rows, results.get(label))
    return (
        f'<div class="maps"><h4>{escape(label)} <small>{facts} {link}</small></h4>'
        f"{figure(figure_svg(bits), 'Bits per weight')}"
        f"{figure(figure_svg(change), f'Compared with {escape(against)}')}</div>"
    )


def _csv(file_name: str, rows: Rows) -> str:
    columns = ("layer", "kind", "bits", "group_size", "size_bytes", "boosted")
    return csv_link(file_name, columns, ([row[column] for column in columns] for row in rows))


def _facts(rows: Rows, result: VariantResult | None) -> str:
    """Bits per weight, bytes, and how near the allocation is to the best one for its cost."""
    facts = [format_bytes(sum(row["size_bytes"] for row in rows))]
    if result and result.bits_per_weight is not None:
        facts.insert(0, f"{format_number(result.bits_per_weight, 3)} bits per weight")
    if result and result.gap is not None:
        exact = result.gap <= PROVEN_GAP
        facts.append("proven optimal" if exact else f"within {format_percent(result.gap, decimals=2)} of the optimum")
    return ", ".join(facts)


def _differences(
    label: str, allocations: Mapping[str, Allocation], results: Mapping[str, VariantResult]
) -> tuple[str, dict[ModuleId, float]]:
    """Bits per weight minus those of the uniform variant nearest in size; without one, minus the own mean."""
    own = allocations[label]
    uniform = [
        (abs((result.size_bytes or 0) - (results[label].size_bytes or 0)), other)
        for other, result in results.items()
        if result.strategy == UNIFORM and other in allocations and label in results
    ]
    if uniform:
        nearest = min(uniform)[1]
        baseline = {module: spec.bits_per_weight for module, spec in allocations[nearest].items()}
        return nearest, {m: spec.bits_per_weight - baseline[m] for m, spec in own.items() if m in baseline}
    mean = float(np.mean([spec.bits_per_weight for spec in own.values()]))
    return "its own mean over modules", {module: spec.bits_per_weight - mean for module, spec in own.items()}


def _legend(scale: Sequence[QuantSpec], any_boosted: bool) -> str:
    swatches = "".join(
        f'<li><i style="background:{ramp_colour(rank, len(scale)).css}"></i>{spec} '
        f"<small>{spec.bits_per_weight:.2f}</small></li>"
        for rank, spec in enumerate(scale)
    )
    changes = "".join(f'<i style="background:{colour.css}"></i>' for colour in DIVERGING)
    boosted = '<li><b class="dot"></b>boosted</li>' if any_boosted else ""
    return (
        f'<ul class="legend swatches">{swatches}{boosted}</ul>'
        f'<p class="legend change"><span>fewer bits</span><span class="strip">{changes}</span><span>more bits</span>'
        "<small>steps at 0, 0.5 and 1.5 bits per weight</small></p>"
    )


def _kind_table(model: ModelReport, allocations: Mapping[str, Allocation]) -> str:
    of_blocks = dict.fromkeys(without_number(kind) for kind in model.structure.kinds)
    kinds = (*of_blocks, *(module.id.kind for module in model.structure.embeddings))
    parameters = {module.id: module.parameters for module in model.structure.quantized}
    columns = [Column("Variant"), *(Column(short_kind(kind, kinds), True, kind) for kind in kinds)]
    rows = []
    for label, allocation in allocations.items():
        cells = [Cell(escape(label), label)]
        for kind in kinds:
            mean = _mean_bits(
                [(spec, parameters[m]) for m, spec in allocation.items() if without_number(m.kind) == kind]
            )
            cells.append(number(format_number(mean, 2), mean))
        rows.append(cells)
    return table(columns, rows, "Mean bits per weight by module kind")


def _mean_bits(specs: Sequence[tuple[QuantSpec, int]]) -> float | None:
    weights = sum(count for _, count in specs)
    return sum(spec.bits_per_weight * count for spec, count in specs) / weights if weights else None
