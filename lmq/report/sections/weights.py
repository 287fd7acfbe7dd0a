"""What the weights themselves say: super weights, large weights by percentile, grids they lie on already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from lmq.measurement.super_weights import SUPER_WEIGHTS
from lmq.measurement.weights import PERCENTILES
from lmq.report.data import ModelReport, Rows
from lmq.report.figures.allocation_map import short_kind
from lmq.report.figures.profiles import layer_curve
from lmq.report.figures.svg import figure_svg
from lmq.report.html import Cell, Column, csv_link, not_measured, number, panels, slug, table
from lmq.report.results import format_number

WEIGHTS = "Large weights and coarse grids"
SPIKE_RATIO = 100.0
"""A spike of this many times the root mean square, on both sides of a module, makes a super weight likely."""
_MOST_SPIKES = 8


def super_weights_part(model: ModelReport) -> str:
    """Spikes in what enters and leaves every `down_proj`, and where the suspected super weights stand."""
    rows = sorted(model.super_weights, key=lambda row: (row["layer"], row["kind"]))
    if not rows:
        return f"<h4>{SUPER_WEIGHTS.title}</h4>{not_measured(SUPER_WEIGHTS.title)}"
    likely = [row for row in rows if _likelihood(row) >= SPIKE_RATIO]
    drawn = [figure_svg(_spikes(model, rows, side)) for side in ("input", "output")]
    note = (
        "A single weight that makes a huge activation shows as a spike in input and output of one down_proj: "
        "largest activation over the root mean square of all."
    )
    answer = (
        f"In {len(likely)} of {len(rows)} modules both spikes are {SPIKE_RATIO:.0f} times the root mean square or more."
        if likely
        else f"In none of {len(rows)} modules are both spikes {SPIKE_RATIO:.0f} times the root mean square."
    )
    header = list(rows[0])
    link = csv_link(f"super-weights-{slug(model.name)}.csv", header, ([row[name] for name in header] for row in rows))
    shown = panels(SUPER_WEIGHTS.title, note, link, drawn, len(drawn))
    return f"{shown}<p>{answer}</p>{_spike_table(model, rows)}"


def _likelihood(row: Mapping[str, Any]) -> float:
    """The smaller ratio of the two sides; 0 where one was not defined."""
    return min(row["input_rms_ratio"] or 0.0, row["output_rms_ratio"] or 0.0)


def _spikes(model: ModelReport, rows: Rows, side: str) -> Any:
    by_layer = {row["layer"]: row[f"{side}_rms_ratio"] for row in rows}
    values = [by_layer.get(layer) for layer in range(model.structure.layers)]
    above = [layer for layer, value in enumerate(values) if value is not None and value >= SPIKE_RATIO]
    return layer_curve(values, title=f"{side} of down_proj", quantity="spike", outlier_layers=above)


def _spike_table(model: ModelReport, rows: Rows) -> str:
    columns = [
        Column("Module"),
        Column("Input spike", True, "over the root mean square"),
        Column("Output spike", True, "over the root mean square"),
        Column("Suspected weight", hint="[output channel, input channel]"),
        Column("Token", True, "of the calibration text, where the output spikes"),
    ]
    first = sorted(rows, key=lambda row: -_likelihood(row))[:_MOST_SPIKES]
    cells = [
        [
            Cell(f"layer {row['layer']} {escape(short_kind(row['kind'], model.structure.kinds))}", row["layer"]),
            *(
                number(format_number(row[f"{side}_rms_ratio"], 0), row[f"{side}_rms_ratio"])
                for side in ("input", "output")
            ),
            Cell(f"[{row['output_channel']}, {row['input_channel']}]", row["output_channel"]),
            number(str(row["output_token"]), row["output_token"]),
        ]
        for row in first
    ]
    return table(columns, cells, f"The {len(first)} modules with the largest spikes on both sides")


def weights_part(model: ModelReport) -> str:
    """Percentiles of |w| by kind, relative to the 99th, and how many matrices lie on a coarse grid."""
    rows = model.statistics
    if not rows or "percentile_99" not in rows[0]:
        return f"<h4>{WEIGHTS}</h4>{not_measured(WEIGHTS)}"
    header = ["layer", "kind", *PERCENTILES, "grid_bits", "grid_group_size"]
    link = csv_link(f"weights-{slug(model.name)}.csv", header, ([row[name] for name in header] for row in rows))
    note = (
        "How far the largest weights stand out: percentiles of |w| over the 99th, mean over the layers. "
        "A coarse grid is one that a quantized source left behind."
    )
    return f'<h4>{WEIGHTS}</h4><p class="note">{note} {link}</p>{_percentile_table(model, rows)}'


def _percentile_table(model: ModelReport, rows: Rows) -> str:
    kinds = [kind for kind in model.structure.kinds if any(row["kind"] == kind for row in rows)]
    columns = [
        Column("Kind"),
        Column("99 %", True, "mean |w| at the 99th percentile"),
        Column("99.9 % over it", True),
        Column("99.99 % over it", True),
        Column("Largest over it", True),
        Column("Largest in any layer", True, "over the 99th percentile of its layer"),
        Column("On a coarse grid", hint="matrices of the kind"),
    ]
    return table(columns, [_kind_row(model, rows, kind) for kind in kinds], "Large weights by kind")


def _kind_row(model: ModelReport, rows: Rows, kind: str) -> list[Cell]:
    own = [row for row in rows if row["kind"] == kind]
    at_99 = float(np.mean([row["percentile_99"] for row in own]))
    ratios = {
        name: [row[name] / row["percentile_99"] for row in own if row["percentile_99"] > 0]
        for name in ("percentile_99_9", "percentile_99_99", "percentile_100")
    }
    means = [float(np.mean(values)) if values else None for values in ratios.values()]
    most = max(ratios["percentile_100"], default=None)
    grids = Counter((row["grid_bits"], row["grid_group_size"]) for row in own if row["grid_bits"] is not None)
    on_grid = ", ".join(f"{count} of {len(own)} at b{bits}g{size}" for (bits, size), count in sorted(grids.items()))
    return [
        Cell(escape(short_kind(kind, model.structure.kinds)), kind),
        number(f"{at_99:.3g}", at_99),
        *(number(format_number(value, 1), value) for value in (*means, most)),
        Cell(on_grid or "none", on_grid),
    ]
