"""One page for several runs: what to use for each model, and which strategy wins how often."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lmq.report.compare import Runs, Tally, Yardstick, by_yardstick, pareto_front, tallies
from lmq.report.figures.perplexity import drawable, strategy_styles
from lmq.report.html import Cell, Column, csv_link, not_measured, number, section, slug, table, text
from lmq.report.page import whole_page
from lmq.report.results import VariantResult, format_bytes, format_measured, format_number
from lmq.report.sections.certainty import equal_bytes_table, offer, tally_table
from lmq.report.sections.variants import RESULT_COLUMNS, perplexity_figure, result_row

_Member = tuple[str, VariantResult]


def build_comparison(runs: Runs) -> str:
    """The runs as one HTML page that needs no other file and no network.

    The same results give the same bytes. Results are laid together only where they have one yardstick: the same
    windows, the same number of tokens and the same perplexity of the full-precision model.
    """
    groups = by_yardstick(runs)
    parts = [_model_section(index, yardstick, members) for index, (yardstick, members) in enumerate(groups.items())]
    if not parts:
        parts = [section("variants", "Variants", not_measured("Variants"))]
    names = ", ".join(escape(run) for run in runs)
    return whole_page(
        title="Comparison · lmq report",
        header=f'<header><p class="kicker">lmq report</p><h1>Comparison</h1><p class="facts">{names}</p></header>',
        main="\n".join([*parts, _tally_section(tallies(groups))]),
        footer="Sizes are in MB of 10⁶ bytes. “–” means not measured. KL divergence is in nats per token.",
    )


def _model_section(index: int, yardstick: Yardstick, members: Sequence[_Member]) -> str:
    results = _distinct([result for _, result in members])
    front = pareto_front(results)
    judged = (
        f'<p class="note">{escape(yardstick.protocol)}, {yardstick.tokens:,} tokens scored, '
        f"full precision: {escape(yardstick.full_precision)}.</p>"
    )
    best = "".join(map(offer, front))
    answer = f'<div class="answer"><p>Not beaten at their size:</p><ul>{best}</ul></div>' if front else ""
    tables = f"{_table(members, front, yardstick)}\n{equal_bytes_table(results)}"
    body = f"{judged}\n{answer}\n{tables}\n{_scatter(yardstick.model, results)}"
    return section(f"model-{index}", yardstick.model, body)


def _distinct(results: Sequence[VariantResult]) -> list[VariantResult]:
    """Results without those that repeat another one's strategy, size and perplexity."""
    return list({(r.strategy, r.size_bytes, r.perplexity): r for r in reversed(results)}.values())[::-1]


def _table(members: Sequence[_Member], front: Sequence[VariantResult], yardstick: Yardstick) -> str:
    columns = [
        Column("Variant"),
        Column("Run"),
        Column("Perplexity", True, "± standard error"),
        Column("Bits per weight", True, "over the quantized matrices, as stored"),
        Column("Matrices", True, "quantized matrices as stored"),
        Column("KL", True, "mean divergence to full precision, nats per token, ± standard error"),
        Column("Front", False, "no other variant is smaller without a higher perplexity"),
    ]
    rows = [_row(run, result, result in front) for run, result in members]
    rows_of_file = ((run, *result_row(result)) for run, result in members)
    data = csv_link(f"{slug(yardstick.model)}.csv", ["run", *RESULT_COLUMNS], rows_of_file)
    return table(columns, rows, f"Variants of {yardstick.model}") + f'<p class="note">{data}</p>'


def _row(run: str, result: VariantResult, on_front: bool) -> list[Cell]:
    return [
        Cell(f'<span class="name">{escape(result.label)}</span>', result.label),
        text(run),
        number(format_measured(result.perplexity, result.perplexity_stderr), result.perplexity),
        number(format_number(result.bits_per_weight, 3), result.bits_per_weight),
        number(format_bytes(result.size_bytes), result.size_bytes),
        number(format_measured(result.kl_divergence, result.kl_divergence_stderr, decimals=4), result.kl_divergence),
        Cell("yes" if on_front else "", "yes" if on_front else None),
    ]


def _scatter(model: str, results: Sequence[VariantResult]) -> str:
    if not drawable(results):
        return ""
    return perplexity_figure(model, results, strategy_styles(results), "Bars are ± one standard error.")


def _tally_section(pairs: Sequence[Tally]) -> str:
    if not pairs:
        return section("tally", "Who wins?", not_measured("Two strategies at one budget"))
    return section("tally", "Who wins?", tally_table(pairs))
