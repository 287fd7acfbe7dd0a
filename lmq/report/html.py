"""Small pieces of HTML: escaped text, sortable tables, figures with their data, folded sections."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

CSV_PREFIX = "data:text/csv;charset=utf-8,"


@dataclass(frozen=True)
class Cell:
    """A table cell: HTML to show, and the value it sorts by (None sorts last)."""

    html: str
    value: float | str | None = None


@dataclass(frozen=True)
class Column:
    """A table column: its heading, whether it holds numbers, and a hint for the heading."""

    heading: str
    number: bool = False
    hint: str = ""


def text(value: str | None) -> Cell:
    """A cell of text; None is shown as not measured."""
    return Cell(missing() if value is None else escape(value), value)


def number(shown: str, value: float | None) -> Cell:
    """A cell that shows a formatted number and sorts by the number itself."""
    return Cell(missing() if value is None else escape(shown), value)


def significant(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def missing() -> str:
    """The sign for "not measured"."""
    return '<span class="missing" title="not measured">–</span>'


def not_measured(what: str) -> str:
    """A paragraph saying that a whole part was not measured."""
    return f'<p class="absent">{escape(what)}: not measured in this run.</p>'


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], caption: str, *, sortable: bool = True) -> str:
    """A table that scrolls sideways on its own; its headings are buttons that sort it."""
    heads = "".join(_heading(column, sortable) for column in columns)
    body = "\n".join("<tr>" + "".join(map(_cell, columns, row, [True] + [False] * len(row))) + "</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table{kind}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _heading(column: Column, sortable: bool) -> str:
    kind = ' class="n"' if column.number else ""
    hint = f' title="{escape(column.hint)}"' if column.hint else ""
    inner = f'<button type="button">{escape(column.heading)}</button>' if sortable else escape(column.heading)
    return f'<th scope="col"{kind}{hint}>{inner}</th>'


def _cell(column: Column, cell: Cell, first: bool) -> str:
    kind = ' class="n"' if column.number else ""
    value = "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'
    return f'<th scope="row"{kind}{value}>{cell.html}</th>' if first else f"<td{kind}{value}>{cell.html}</td>"


def figure(svg: str, caption: str = "", download: str = "", css_class: str = "") -> str:
    """A figure with an optional caption (HTML) and a link to its data."""
    under = f"<figcaption>{caption} {download}</figcaption>" if caption or download else ""
    return f'<figure class="{css_class}">{svg}{under}</figure>' if css_class else f"<figure>{svg}{under}</figure>"


def panels(title: str, meaning: str, link: str, figures: Sequence[str], measured: int, legend: str = "") -> str:
    """Small figures of one measurement side by side, under its title and what it means (text)."""
    rest = f" {measured - len(figures)} more kinds are in the CSV." if measured > len(figures) else ""
    drawn = "".join(f"<figure>{one}</figure>" for one in figures)
    return (
        f'<h4>{escape(title)}</h4><p class="note">{escape(meaning)}{rest} {link}</p>{legend}'
        f'<div class="panels">{drawn}</div>'
    )


def csv_link(file_name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A link that saves the data behind a figure as CSV; the data is inside the page. None becomes empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data = quote(buffer.getvalue(), safe=",.:/@+ ").replace(" ", "%20")
    return f'<a class="csv" download="{escape(file_name)}" href="{CSV_PREFIX}{data}">CSV</a>'


def details(summary: str, body: str) -> str:
    """A folded section; printing unfolds it."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def section(anchor: str, title: str, body: str) -> str:
    """One of the page's numbered sections."""
    heading = f'<h2 id="{anchor}-title">{escape(title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{heading}\n{body}\n</section>'


def slug(name: str) -> str:
    """A name as part of a file name: letters, digits, dots, with dashes between."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")
