"""How sure is the answer: paired differences to uniform, what nothing else beats, and who wins how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lmq.report.compare import Tally, by_yardstick, equal_bytes, pareto_front, tallies
from lmq.report.data import PairedDifference, ReportData
from lmq.report.figures.perplexity import drawable
from lmq.report.html import Column, csv_link, not_measured, number, table, text
from lmq.report.results import (
    VariantResult,
    format_bytes,
    format_difference,
    format_measured,
    format_number,
    format_percent,
)

SURE_STDERRS = 2.0
"""Differences within this many standard errors are not told apart."""


def certainty_part(data: ReportData, several_models: bool) -> str:
    """Paired differences, the front, the comparison at equal bytes, and who wins where a run has several budgets."""
    pairs = tallies(by_yardstick({data.run: data.results}))
    budgets = {(result.model, result.budget) for result in data.results if result.budget is not None}
    tally = tally_table(pairs) if pairs and len(budgets) > 1 else ""
    parts = (
        "<h3>How sure is that?</h3>",
        _paired_table(data, several_models),
        _fronts(data.results, several_models),
        equal_bytes_table(data.results),
        tally,
    )
    return "".join(parts)


def _paired_table(data: ReportData, several_models: bool) -> str:
    if not data.paired:
        return not_measured("Differences to uniform, window by window")
    sizes = {(result.model, result.label): result.size_bytes for result in data.results}
    columns = [
        Column("Variant"),
        *([Column("Model")] if several_models else []),
        Column("Against"),
        Column("Perplexity, relative", True, "from the mean difference of log-perplexity over the same windows"),
        Column("In standard errors", True, "the difference over the standard error of its mean"),
        Column("More bytes", True, "of the quantized matrices"),
        Column("Verdict"),
    ]
    rows = []
    for pair in data.paired:
        ratio, errors = math.expm1(pair.difference), _standard_errors(pair)
        own, other = (sizes.get((pair.model, label)) for label in (pair.variant, pair.baseline))
        more = own - other if own is not None and other is not None else None
        stderr = format_percent(pair.stderr * math.exp(pair.difference), decimals=1)
        rows.append(
            [
                text(pair.variant),
                *([text(pair.model)] if several_models else []),
                text(pair.baseline),
                number(f"{format_percent(ratio, signed=True)} ± {stderr}", ratio),
                number(format_number(errors, 1), errors),
                number(format_difference(more), more),
                text(paired_verdict(pair)),
            ]
        )
    header = ["model", "variant", "baseline", "difference", "stderr"]
    data_rows = ((p.model, p.variant, p.baseline, p.difference, p.stderr) for p in data.paired)
    link = csv_link("paired-differences.csv", header, data_rows)
    note = (
        '<p class="note">Both variants are scored on the same windows, so what the windows have in common cancels: two '
        f"overlapping ± in the table of variants do not mean a tie. Lower perplexity is better. {link}</p>"
    )
    return table(columns, rows, "Against uniform at the same budget, window by window") + note


def paired_verdict(pair: PairedDifference) -> str:
    """In words whether the variant differs from its baseline by more than two standard errors."""
    if abs(pair.difference) <= SURE_STDERRS * pair.stderr:
        return "not told apart"
    return "better" if pair.difference < 0 else "worse"


def _standard_errors(pair: PairedDifference) -> float | None:
    return pair.difference / pair.stderr if pair.stderr > 0 else None


def equal_bytes_table(results: Sequence[VariantResult]) -> str:
    """Variants against uniform at their own size; nothing where no variant is between two uniform ones."""
    models = list(dict.fromkeys(result.model for result in results))
    comparisons = [one for model in models for one in equal_bytes([r for r in results if r.model == model])]
    if not comparisons:
        return ""
    several = len(models) > 1
    columns = [
        Column("Variant"),
        *([Column("Model")] if several else []),
        Column("Matrices", True, "quantized matrices as stored"),
        Column("Perplexity", True),
        Column("Uniform at equal bytes", True, "log-perplexity interpolated over the size"),
        Column("Relative", True, "below 0 is better"),
        Column("Between"),
    ]
    rows = [
        [
            text(one.variant.label),
            *([text(one.variant.model)] if several else []),
            number(format_bytes(one.variant.size_bytes), one.variant.size_bytes),
            number(format_number(one.variant.perplexity, 2), one.variant.perplexity),
            number(format_number(one.uniform_perplexity, 2), one.uniform_perplexity),
            number(format_percent(one.relative, signed=True), one.relative),
            text(" and ".join(dict.fromkeys((one.smaller.label, one.larger.label)))),
        ]
        for one in comparisons
    ]
    note = (
        '<p class="note">What uniform quantization would reach at the variant’s own size, so that no strategy wins by '
        "taking more bytes. Nothing is said of variants beyond the measured uniform ones.</p>"
    )
    return table(columns, rows, "Against uniform at equal bytes") + note


def _fronts(results: Sequence[VariantResult], several_models: bool) -> str:
    parts = []
    for model in dict.fromkeys(result.model for result in results):
        front = pareto_front(drawable([result for result in results if result.model == model]))
        if len(front) > 1:
            of = f" of {escape(model)}" if several_models else ""
            parts.append(f"<p>Not beaten at their size{of}, smallest first:</p><ul>{''.join(map(offer, front))}</ul>")
    return "".join(parts)


def offer(result: VariantResult) -> str:
    """A list item: size, name and perplexity of a variant."""
    perplexity = format_measured(result.perplexity, result.perplexity_stderr)
    return (
        f"<li>{format_bytes(result.size_bytes)}: <strong>{escape(result.label)}</strong>, "
        f'perplexity <span class="figure">{perplexity}</span></li>'
    )


def tally_table(pairs: Sequence[Tally]) -> str:
    """Wins, ties and losses of every two strategies, with how they are counted."""
    columns = [
        Column("Strategy"),
        Column("Against"),
        Column("Wins", True),
        Column("Ties", True),
        Column("Losses", True),
    ]
    rows = [
        [text(t.strategy), text(t.against), *(number(str(count), count) for count in (t.wins, t.ties, t.losses))]
        for t in pairs
    ]
    note = (
        '<p class="note">Over models and budgets where both were measured; perplexities rounded to two decimals, lower '
        "wins. Budgets are equal, sizes need not be: boosts exceed theirs.</p>"
    )
    return table(columns, rows, "Wins, ties and losses") + note
