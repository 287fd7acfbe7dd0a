"""Pages of the studies: a table of rank correlations and the figures, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from lmq.report.figures.svg import figure_svg
from lmq.report.html import Cell, Column, figure, number, section, table, text
from lmq.report.page import whole_page
from lmq.report.study import AgreementSummary, CostQuality

_WIDE_PX = 400


def sensitivity_page(summaries: Sequence[AgreementSummary], figures: Sequence[Figure], notes: Sequence[str]) -> str:
    """How well sensitivity patterns agree, as one HTML page that needs no other file."""
    parts = list(dict.fromkeys(part for summary in summaries for part in summary.by_part))
    columns = [Column("Dimension"), Column("Between")]
    columns += [Column(part, number=True) for part in parts]
    columns += [
        Column("Mean", number=True, hint="over all parts and all that else was varied"),
        Column("Lowest", number=True, hint="of all single comparisons"),
        Column("Steps", number=True, hint="mean ρ of the ratios between neighbouring layers"),
    ]
    rows = [
        [text(summary.dimension), text(f"{summary.first} – {summary.second}")]
        + [_correlation(summary.by_part.get(part)) for part in parts]
        + [_correlation(value) for value in (summary.profiles, summary.lowest, summary.steps)]
        for summary in summaries
    ]
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    body = section(
        "agreement",
        "Do the patterns agree?",
        table(columns, rows, "Spearman's ρ of activation sensitivity over the layers") + said,
    )
    return _page("Sensitivity study", body, figures)


def costs_page(qualities: Sequence[CostQuality], figures: Sequence[Figure]) -> str:
    """How well cheap costs predict the exact one, as one HTML page that needs no other file."""
    columns = [
        Column("Cost"),
        Column("All pairs", number=True),
        Column("Standard error", number=True, hint="bootstrap over the pairs"),
        Column("Within a configuration", number=True, hint="mean of ρ among the pairs of one configuration"),
    ]
    rows = [
        [text(item.cost), *(_correlation(value) for value in (item.rho, item.rho_stderr, item.within))]
        for item in qualities
    ]
    caption = "Spearman's ρ with the measured divergence of the model with one module quantized"
    return _page("Cost study", section("costs", "Which cost predicts best?", table(columns, rows, caption)), figures)


def _page(title: str, body: str, figures: Sequence[Figure]) -> str:
    """Figures stand one below the other, small ones side by side."""
    width_px = max(item.get_size_inches()[0] * 72 for item in figures)
    panels = "".join(figure(figure_svg(item)) for item in figures)
    place = 'class="panels"' if width_px < _WIDE_PX else f'style="max-width:{width_px:g}px;display:grid;gap:24px"'
    drawn = section("figures", "Figures", f"<div {place}>{panels}</div>")
    header = f'<header><p class="kicker">lmq study</p><h1>{escape(title)}</h1></header>'
    return whole_page(title=f"{title} · lmq", header=header, main=f"{body}\n{drawn}", footer="“–” means not defined.")


def _correlation(value: float | None) -> Cell:
    return number("" if value is None else f"{value:.3f}".replace("-", "−"), value)
