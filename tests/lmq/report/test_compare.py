from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmq.errors import InputError
from lmq.report.compare import Tally, by_yardstick, equal_bytes, pareto_front, seeded_draws, tallies
from lmq.report.results import VariantResult
from lmq.report.results_table import latex_table
from lmq.report.sections.comparison import build_comparison
from tests.lmq.report.browser import Page
from tests.lmq.report.synthetic_report import results as synthetic_results

FULL = VariantResult(model="m", strategy="full-precision", perplexity=10.0, protocol="strided 8/4", tokens=100)


def variant(strategy: str, budget: str, perplexity: float | None, size: int = 100) -> VariantResult:
    return replace(FULL, strategy=strategy, budget=budget, perplexity=perplexity, size_bytes=size)


RUN = [
    FULL,
    variant("uniform", "4 bpw", 12.0),
    variant("mxq", "4 bpw", 12.004),
    variant("loss-aware", "4 bpw", 11.0),
    variant("uniform", "3 bpw", 20.0, 80),
    variant("mxq", "3 bpw", 21.0, 80),
    variant("loss-aware", "3 bpw", None, 80),
]


def test_results_are_laid_together_only_when_they_were_judged_alike() -> None:
    other_text = [replace(FULL, perplexity=9.0), variant("kl", "4 bpw", 11.5)]
    other_windows = [replace(result, protocol="non-overlapping 8") for result in RUN[:2]]
    same = [FULL, variant("auto", "4 bpw", 10.5)]
    groups = by_yardstick({"a": RUN, "b": other_text, "c": other_windows, "d": same})
    found = {
        (key.protocol, key.full_precision): [(run, result.strategy) for run, result in members]
        for key, members in groups.items()
    }
    assert found["strided 8/4", "9.0000"] == [("b", "full-precision"), ("b", "kl")]
    assert found["non-overlapping 8", "10.0000"] == [("c", "full-precision"), ("c", "uniform")]
    assert [run for run, _ in found["strided 8/4", "10.0000"]] == ["a"] * 6 + ["d"] * 2
    assert ("a", "loss-aware") in found["strided 8/4", "10.0000"]
    with pytest.raises(InputError, match="no run to compare"):
        by_yardstick({})


def test_the_front_is_what_nothing_smaller_or_equal_beats() -> None:
    measured = [result for result in RUN if result.perplexity is not None]
    candidates = [*measured, variant("big", "8 bpw", 11.0, 200), variant("tiny", "2 bpw", 50.0, 60)]
    front = pareto_front(candidates)
    brute = [
        one
        for one in candidates
        if one.size_bytes is not None
        and not any(
            other is not one
            and other.size_bytes is not None
            and (other.size_bytes, other.perplexity) <= (one.size_bytes, one.perplexity)
            and other.perplexity <= one.perplexity
            for other in candidates
        )
    ]
    assert front == sorted(brute, key=lambda result: result.size_bytes)
    assert [result.strategy for result in front] == ["tiny", "uniform", "loss-aware"]


def test_wins_ties_and_losses_are_counted_at_two_decimals() -> None:
    again = [FULL, variant("uniform", "4 bpw", 12.5)]
    found = {(t.strategy, t.against): t for t in tallies(by_yardstick({"a": RUN, "b": again}))}
    assert found["uniform", "mxq"] == Tally(strategy="uniform", against="mxq", wins=1, ties=1, losses=0)
    assert found["mxq", "uniform"] == Tally(strategy="mxq", against="uniform", wins=0, ties=1, losses=1)
    assert found["loss-aware", "uniform"] == Tally(strategy="loss-aware", against="uniform", wins=1)
    assert next(iter(found)) == ("loss-aware", "uniform")


def test_draws_of_an_ablation_are_summed_up_and_not_picked_from() -> None:
    values = [12.0, 12.5, 13.3]
    draws = [variant(f"random-boost like=kurt-boost seed={seed}", "4 bpw", v) for seed, v in enumerate(values)]
    alone = variant("random-boost seed=1", "4 bpw", 14.0)
    (found,) = seeded_draws([*RUN, *draws, alone])
    assert (found.strategy, found.budget, found.count) == ("random-boost like=kurt-boost", "4 bpw", 3)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))


def test_the_page_opens_by_itself_and_shows_every_run(tmp_path: Path, tab: Page) -> None:
    second = [replace(result, model="<other>") for result in RUN]
    page = build_comparison({"night <1>": RUN, "two": second, "synthetic": synthetic_results(count=9)})
    assert build_comparison({"night <1>": RUN, "two": second, "synthetic": synthetic_results(count=9)}) == page
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    tab.open(file)
    assert tab.problems == []
    dom = tab.run("document.body.innerHTML")
    assert "night &lt;1&gt;" in dom
    assert "<other>" not in dom
    assert dom.count('class="sortable"') == 7


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    page = build_comparison({"empty": [VariantResult(model="m", strategy="mxq", budget="4 bpw", error="broke")]})
    assert page.count("not measured in this run") == 2


def test_a_latex_table_escapes_what_latex_would_read() -> None:
    table = latex_table([FULL, replace(variant("mxq", "uniform b4g64 +2%", 35.0), model="a_b", perplexity_stderr=0.41)])
    assert table.startswith("\\begin{tabular}{lll")
    assert "a\\_b & mxq & -- & uniform b4g64 +2\\%" in table
    assert "35.00 $\\pm$ 0.41" in table
    assert table.count(r"\\") == 3


def sized(strategy, size_bytes, perplexity):
    return VariantResult(
        model="m", strategy=strategy, budget=f"{size_bytes} B", size_bytes=size_bytes, perplexity=perplexity
    )


SIZED_UNIFORM = [sized("uniform", 300, 40.0), sized("uniform", 200, 90.0), sized("uniform", 400, 35.0)]


@pytest.mark.parametrize("size", [200, 210, 300, 385, 400])
def test_uniform_at_equal_bytes_is_interpolated_in_log_perplexity(size):
    [found] = equal_bytes([*SIZED_UNIFORM, sized("mxq", size, 30.0)])
    expected = float(np.exp(np.interp(size, [200, 300, 400], np.log([90.0, 40.0, 35.0]))))
    assert found.uniform_perplexity == pytest.approx(expected)
    assert found.relative == pytest.approx(30.0 / expected - 1)
    assert found.smaller.size_bytes <= size <= found.larger.size_bytes


def test_nothing_is_said_beyond_what_was_measured():
    outside = [sized("sensi-boost", 401, 30.0), sized("mxq", 199, 95.0), sized("mxq", 250, None)]
    full = VariantResult(model="m", strategy="full-precision", size_bytes=300, perplexity=20.0)
    assert equal_bytes([*SIZED_UNIFORM, *outside, full]) == []
    assert equal_bytes([SIZED_UNIFORM[0], sized("mxq", 350, 30.0)]) == []
    assert len(equal_bytes([SIZED_UNIFORM[0], sized("mxq", 300, 30.0)])) == 1
