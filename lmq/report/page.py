"""The whole page."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from lmq.report.data import ReportData
from lmq.report.figures.palette import theme_css
from lmq.report.sections.allocations import allocations_section
from lmq.report.sections.reasons import reasons_section
from lmq.report.sections.stages import costs_section, reproduce_section
from lmq.report.sections.variants import variants_section

_NAVIGATION = (
    ("variants", "Variants"),
    ("allocations", "Allocations"),
    ("reasons", "Reasons"),
    ("costs", "Costs"),
    ("reproduce", "Reproduce"),
)


def build_report(data: ReportData) -> str:
    """The run's report as one HTML page that needs no other file and no network.

    The same data gives the same bytes. Parts that were not measured say so. Colours follow the reader's
    light or dark preference; print is light with every folded part open.
    """
    sections = (
        variants_section(data),
        allocations_section(data),
        reasons_section(data),
        costs_section(data),
        reproduce_section(data),
    )
    body = "\n".join(sections)
    return whole_page(
        title=f"{data.run} · lmq report",
        header=_header(data),
        main=body,
        footer="Sizes are in MB of 10⁶ bytes. “–” means not measured. KL divergence is in nats per token.",
    )


def whole_page(*, title: str, header: str, main: str, footer: str) -> str:
    """A page with the project's style and scripts inside; `title` is text, the others are HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{theme_css()}{_resource("report.css")}</style>
</head>
<body>
<button type="button" class="theme" hidden>Theme: system</button>
{header}
<main>
{main}
</main>
<footer>{footer}</footer>
<script>
{_resource("report.js")}</script>
</body>
</html>
"""


def _header(data: ReportData) -> str:
    models = list(dict.fromkeys(result.model for result in data.results))
    failed = sum(result.error is not None for result in data.results)
    facts = [escape(model) for model in models[:3]]
    if len(models) > 3:
        facts.append(f"{len(models) - 3} more models")
    facts.append(f"{len(data.results)} variant{'' if len(data.results) == 1 else 's'}")
    if failed:
        facts.append(f'<span class="failed">{failed} failed</span>')
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in _NAVIGATION)
    return (
        f'<header><p class="kicker">lmq report</p><h1>{escape(data.run)}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
    )


def _resource(name: str) -> str:
    return files("lmq.report").joinpath(name).read_text(encoding="utf-8")
