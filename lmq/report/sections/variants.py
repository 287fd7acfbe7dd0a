"""Section 1: which variant should I use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape

from lmq.report.compare import Verdict, best_measured, verdicts
from lmq.report.data import ReportData
from lmq.report.figures.palette import SeriesStyle
from lmq.report.figures.perplexity import drawable, perplexity_by_size, strategy_styles
from lmq.report.figures.svg import figure_svg
from lmq.report.html import Cell, Column, csv_link, figure, not_measured, number, section, slug, table, text
from lmq.report.results import (
    FULL_PRECISION,
    UNIFORM,
    VariantResult,
    format_bytes,
    format_measured,
    format_number,
    format_percent,
    full_precision_of,
    relative_perplexity,
)
from lmq.report.sections.certainty import certainty_part
from lmq.report.sections.performance import performance_part, tasks_part

RESULT_COLUMNS = [item.name for item in fields(VariantResult) if item.name != "tasks"]
"""Columns of a CSV of variants; their tasks have a file of their own."""
MOST_SENTENCES = 3
"""Uniform variants answered in a sentence each; more become a table."""


def result_row(result: VariantResult) -> list[object]:
    """Values of `RESULT_COLUMNS`."""
    return [getattr(result, name) for name in RESULT_COLUMNS]


def variants_section(data: ReportData) -> str:
    """The answer in sentences, the table of variants, and perplexity against size."""
    models = list(dict.fromkeys(result.model for result in data.results))
    if not models:
        return section("variants", "Which variant should I use?", not_measured("Variants"))
    several = len(models) > 1
    answers = "\n".join(_answer(model, data, named=several) for model in models)
    figures = "\n".join(_scatter(model, data, named=several) for model in models)
    tables = f"{_variant_table(data.results, several)}\n{_failures(data.results, several)}"
    more = "\n".join(part(data.results, several) for part in (performance_part, tasks_part))
    body = f"{answers}\n{tables}\n{figures}\n{certainty_part(data, several)}\n{more}"
    return section("variants", "Which variant should I use?", body)


def _answer(model: str, data: ReportData, *, named: bool) -> str:
    judged = verdicts(model, data.results, data.paired)
    heading = f"<h3>{escape(model)}</h3>" if named else ""
    if not judged:
        return f'<div class="answer">{heading}{_without_uniform(model, data.results)}</div>'
    full = full_precision_of(model, data.results)
    if len(judged) > MOST_SENTENCES:
        return f'<div class="answer">{heading}{_many_sizes(judged, full)}</div>'
    sentences = "".join(f"<p>{_sentence(verdict, full)}</p>" for verdict in judged)
    return f'<div class="answer">{heading}{sentences}</div>'


def _without_uniform(model: str, results: Sequence[VariantResult]) -> str:
    best = best_measured(model, results)
    if best is None:
        return "<p>No quantized variant of this model was measured, so there is nothing to recommend.</p>"
    return (
        f"<p>Lowest perplexity: <strong>{escape(best.label)}</strong>, {_perplexity(best)} at "
        f"{format_bytes(best.size_bytes)}. The run has no measured uniform variant, "
        "so it cannot say what choosing the bits per matrix gained.</p>"
    )


def _sentence(verdict: Verdict, full: VariantResult | None) -> str:
    uniform, best = verdict.uniform, verdict.best
    size = format_bytes(uniform.size_bytes)
    if not verdict.beats_uniform:
        return (
            f"Up to {size}: <strong>{escape(uniform.label)}</strong>, perplexity {_perplexity(uniform)}. "
            "No other variant in this run is better at no more bytes."
        )
    return (
        f"Up to {size}: <strong>{escape(best.label)}</strong>, perplexity {_perplexity(best)} against "
        f"{_perplexity(uniform)} for {escape(uniform.label)}. {_gap(verdict, full)}"
    )


def _gap(verdict: Verdict, full: VariantResult | None) -> str:
    if verdict.gap_closed is None:
        return "How much of the gap to full precision that closes was not measured."
    reference = f"full precision ({_perplexity(full)})" if full else "full precision"
    if verdict.gap_closed_stderr is None:
        return (
            f"That closes {_share(verdict)} of the log-perplexity gap to {reference}; "
            "the paired uncertainty of this share was not measured."
        )
    certainty = "" if verdict.distinguishable else ": within two standard errors, so not distinguishable from uniform"
    return f"That closes {_share(verdict)} (paired) of the log-perplexity gap to {reference}{certainty}."


def _share(verdict: Verdict) -> str:
    share = format_percent(verdict.gap_closed, decimals=0)
    if verdict.gap_closed_stderr is None:
        return share
    return f"{share} ± {format_percent(verdict.gap_closed_stderr, decimals=0)}"


def _perplexity(result: VariantResult) -> str:
    return f'<span class="figure">{format_measured(result.perplexity, result.perplexity_stderr)}</span>'


def _many_sizes(judged: Sequence[Verdict], full: VariantResult | None) -> str:
    better = sum(verdict.beats_uniform for verdict in judged)
    reference = f" Full precision: {_perplexity(full)}." if full else ""
    return (
        f"<p>At {better} of {len(judged)} sizes another strategy has a lower perplexity than uniform "
        f"at no more bytes.{reference}</p>{_verdict_table(judged)}"
        '<p class="note">Gap closed: share of the log-perplexity gap between uniform and full precision, '
        "± its paired standard error where that was measured.</p>"
    )


def _verdict_table(judged: Sequence[Verdict]) -> str:
    columns = [Column("At most", True), Column("Best variant"), Column("Perplexity", True), Column("Uniform")]
    columns += [Column("Its perplexity", True), Column("Gap closed", True)]
    rows = [
        [
            number(format_bytes(v.uniform.size_bytes), v.uniform.size_bytes),
            text(v.best.label),
            number(format_measured(v.best.perplexity, v.best.perplexity_stderr), v.best.perplexity),
            text(v.uniform.label),
            number(format_measured(v.uniform.perplexity, v.uniform.perplexity_stderr), v.uniform.perplexity),
            number(_share(v), v.gap_closed),
        ]
        for v in judged
    ]
    return table(columns, rows, "Best variant at no more bytes than each uniform one")


def _variant_table(results: Sequence[VariantResult], several_models: bool) -> str:
    tokens = {result.tokens for result in results if result.tokens is not None}
    same_tokens = len(tokens) <= 1
    columns = [
        Column("Variant"),
        *([Column("Model")] if several_models else []),
        Column("Perplexity", True, "± standard error"),
        Column("vs full", True, "perplexity relative to full precision"),
        Column("Bits per weight", True, "over the quantized matrices, as stored"),
        Column("Matrices", True, "quantized matrices as stored"),
        Column("On disk", True, "the whole checkpoint directory"),
        Column("KL", True, "mean divergence to full precision, nats per token, ± standard error"),
        Column("KL 99 %", True, "99th percentile of the tokens' divergence: how bad the worst tokens are"),
        Column("Top-1", True, "share of tokens where the likeliest next token is the same as at full precision"),
        *([] if same_tokens else [Column("Tokens", True, "tokens scored")]),
        Column("Time", True, "seconds of evaluation"),
    ]
    rows = [_variant_row(result, results, several_models, same_tokens) for result in results]
    protocols = ", ".join(sorted({result.protocol for result in results if result.protocol}))
    windows = f" in windows: {protocols}" if protocols else ""
    scored = f"Scored on {tokens.pop():,} tokens{windows}. " if len(tokens) == 1 else ""
    link = csv_link("variants.csv", RESULT_COLUMNS, map(result_row, results))
    return table(columns, rows, "Variants") + f'<p class="note">{scored}Select a heading to sort. {link}</p>'


def _variant_row(
    result: VariantResult, results: Sequence[VariantResult], several_models: bool, same_tokens: bool
) -> list[Cell]:
    failed = ' <span class="failed">failed</span>' if result.error else ""
    name = f'<span class="name">{escape(result.strategy)}</span>{failed}'
    if result.budget:
        name += f'<span class="budget">{escape(result.budget)}</span>'
    relative = relative_perplexity(result, results)
    vs_full = (
        Cell("reference", 0.0)
        if result.strategy == FULL_PRECISION
        else number(format_percent(relative, signed=True), relative)
    )
    return [
        Cell(name, result.label),
        *([text(result.model)] if several_models else []),
        number(format_measured(result.perplexity, result.perplexity_stderr), result.perplexity),
        vs_full,
        number(format_number(result.bits_per_weight, 3), result.bits_per_weight),
        number(format_bytes(result.size_bytes), result.size_bytes),
        number(format_bytes(result.checkpoint_bytes), result.checkpoint_bytes),
        number(format_measured(result.kl_divergence, result.kl_divergence_stderr, decimals=4), result.kl_divergence),
        number(format_number(result.kl_p99, 3), result.kl_p99),
        number(format_percent(result.top1_agreement), result.top1_agreement),
        *([] if same_tokens else [number(format_number(result.tokens, 0), result.tokens)]),
        number(f"{format_number(result.seconds, 1)} s", result.seconds),
    ]


def _failures(results: Sequence[VariantResult], several_models: bool) -> str:
    failed = [result for result in results if result.error]
    if not failed:
        return ""
    items = "".join(
        f"<li><strong>{escape(f'{result.model} · ' * several_models + result.label)}</strong>"
        f"<pre>{escape(result.error or '')}</pre></li>"
        for result in failed
    )
    return f'<div class="failures"><h4>Failed variants</h4><ul>{items}</ul></div>'


def _scatter(model: str, data: ReportData, *, named: bool) -> str:
    own = [result for result in data.results if result.model == model]
    shown = drawable(own)
    if not shown:
        return not_measured(f"Perplexity against size of {model}")
    header = ["strategy", "budget", "size_bytes", "perplexity", "perplexity_stderr"]
    rows = [(r.strategy, r.budget, r.size_bytes, r.perplexity, r.perplexity_stderr) for r in shown]
    left_out = sum(result.strategy != FULL_PRECISION for result in own) - len(shown)
    caption = f"{escape(model)}. " if named else ""
    caption += "Bars are ± one standard error. "
    if left_out:
        caption += f"Not drawn: {left_out} without a measured size or perplexity. "
    link = csv_link(f"perplexity-by-size-{slug(model)}.csv", header, rows)
    return perplexity_figure(model, own, strategy_styles(data.results), caption, link)


def perplexity_figure(
    model: str, own: Sequence[VariantResult], styles: Mapping[str, SeriesStyle], caption: str, download: str = ""
) -> str:
    """Perplexity against size of one model's variants `own`, drawn for wide and for narrow screens."""
    wide = figure_svg(perplexity_by_size(own, model=model, styles=styles))
    narrow = figure_svg(perplexity_by_size(own, model=model, styles=styles, width_px=360, height_px=400))
    drawn = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    legend = _legend([result.strategy for result in drawable(own)], styles)
    return figure(legend + drawn, caption, download, "scatter")


def _legend(strategies: Sequence[str], styles: Mapping[str, SeriesStyle]) -> str:
    items = ['<li><span style="color:var(--muted)">■</span> uniform</li>'] if UNIFORM in strategies else []
    items += [
        f'<li><span style="color:{style.colour.css}">{style.glyph}</span> {escape(name)}</li>'
        for name, style in styles.items()
        if name in strategies
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
