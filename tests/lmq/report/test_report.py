import csv
import io
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from lmq.formats.spec import STOPS
from lmq.report.compare import verdicts
from lmq.report.data import ModelReport, PairedDifference, ReportData, StageTiming
from lmq.report.page import build_report
from lmq.report.sections.allocations import OPEN_MAPS
from lmq.report.sections.costs import one_per_width
from lmq.report.sections.stages import format_duration
from tests.lmq.report.synthetic_report import FULL_PERPLEXITY, MODEL, model_report, report_data, results, structure

VOID = {"meta", "br", "hr", "img", "link"}


class Nesting(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def plain(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html))


@pytest.fixture(scope="module")
def page():
    return build_report(report_data())


def test_page_is_well_formed_and_needs_nothing_else(page):
    nesting = Nesting()
    nesting.feed(page)
    assert nesting.open == []
    assert not re.search(r"https?://|src=|url\(|@import", page)
    links = re.findall(r'href="([^"]*)"', page)
    assert links
    assert all(link.startswith(("#", "data:text/csv")) for link in links)


def test_same_data_gives_same_bytes_in_any_thread(page):
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: build_report(report_data()), range(2))) == {page}


@pytest.mark.parametrize(("variants", "most_bytes"), [(20, 1_000_000), (60, 3_000_000)])
def test_many_variants_stay_small_and_fold(variants, most_bytes):
    html = build_report(report_data(variants))
    assert len(html.encode()) < most_bytes
    allocations = model_report(variants=variants).allocations.values()
    mixed = sum(len({(row["bits"], row["group_size"]) for row in rows}) > 1 for rows in allocations)
    assert html.count('<div class="maps">') == mixed
    maps = html[html.index('<section id="allocations"') : html.index('<section id="reasons"')]
    assert maps.count("<details><summary>") == mixed - OPEN_MAPS


def test_answer_names_the_best_variant_and_its_share_of_the_gap(page):
    uniform, best = results()[1], results()[3]
    share = math.log(uniform.perplexity / best.perplexity) / math.log(uniform.perplexity / FULL_PERPLEXITY)
    answer = plain(re.search(r'<div class="answer">.*?</div>', page, re.S)[0])
    assert "Up to 56.5 MB: loss-aware @ uniform b4g64, perplexity 35.66 ± 0.39 against 37.80 ± 0.42" in answer
    assert f"closes {share:.0%} ± 4% (paired) of the log-perplexity gap to full precision (29.19 ± 0.33)" in answer
    alone = build_report(ReportData(run="r", results=results()))
    assert "paired uncertainty of this share was not measured" in alone


@pytest.mark.parametrize(("stderr", "distinguishable"), [(0.01, True), (0.05, False)])
def test_paired_differences_give_the_share_an_uncertainty(stderr, distinguishable):
    uniform, best = results()[1], results()[3]
    difference = math.log(best.perplexity / uniform.perplexity)
    pair = PairedDifference(
        model=MODEL, variant=best.label, baseline=uniform.label, difference=difference, stderr=stderr
    )
    [verdict] = verdicts(MODEL, results(), [pair])
    gap = math.log(uniform.perplexity / FULL_PERPLEXITY)
    assert verdict.gap_closed == pytest.approx(-difference / gap)
    assert verdict.gap_closed_stderr == pytest.approx(stderr / gap)
    assert verdict.distinguishable is distinguishable
    html = build_report(ReportData(run="r", results=results(), paired=[pair]))
    assert f"± {stderr / gap:.0%} (paired)" in html
    assert ("not distinguishable from uniform" in html) is not distinguishable


def test_a_larger_variant_never_wins_and_uniform_can():
    full, uniform, *_ = results()
    larger = replace(uniform, strategy="mxq", size_bytes=uniform.size_bytes + 1, perplexity=30.0)
    worse = replace(uniform, strategy="mxq", perplexity=uniform.perplexity + 1)
    [verdict] = verdicts(MODEL, [full, uniform, larger, worse])
    assert not verdict.beats_uniform
    html = build_report(ReportData(run="r", results=[full, uniform, larger, worse]))
    assert "No other variant in this run is better at no more bytes" in html


def test_more_than_three_uniform_sizes_become_a_table():
    html = build_report(ReportData(run="r", results=results(count=26)))
    assert "At 5 of 5 sizes another strategy has a lower perplexity than uniform" in plain(html)


def test_failed_variants_show_their_escaped_error(page):
    assert "the budget of 10 bytes is below &lt;the smallest&gt;" in page
    assert "<the smallest>" not in page
    assert "1 failed" in page


def test_what_was_not_measured_is_said():
    text = plain(build_report(ReportData(run="empty", results=[])))
    for part in ("Variants", "Allocations", "Stages", "Configuration", "Digests", "Versions"):
        assert f"{part}: not measured in this run." in text
    bare = ReportData(run="bare", results=results()[:1], models=[ModelReport(name=MODEL, structure=structure(2))])
    text = plain(build_report(bare))
    for part in ("Activation sensitivity", "Kurtosis of the weights", "Loss-aware cost", "Frobenius error"):
        assert f"{part}: not measured in this run." in text
    assert "nothing to recommend" in text


def test_what_makes_measurements_unfair_is_said_first(page):
    data = report_data()
    warned = build_report(replace(data, models=[replace(data.models[0], warnings=["b4g32 <rebuilds> the weights"])]))
    reasons = warned[warned.index('<section id="reasons"') :]
    assert reasons.index('<p class="warning">b4g32 &lt;rebuilds&gt; the weights</p>') < reasons.index("<h4>")
    assert 'class="warning"' not in page


def test_one_variant_alone_works():
    only = replace(results()[3], perplexity_stderr=None, kl_divergence=None)
    report = replace(model_report(), allocations={only.label: model_report().allocations[only.label]})
    html = build_report(ReportData(run="one", results=[only], models=[report]))
    assert "no measured uniform variant" in html
    assert "Compared with its own mean over modules" in html
    assert "1 variant<" in html


def test_several_models_are_named():
    second = replace(results()[1], model="Other<7B>")
    data = ReportData(run="two", results=[*results(), second], models=[model_report(), model_report("Other<7B>", 4)])
    html = build_report(data)
    assert "<h3>Other&lt;7B&gt;</h3>" in html
    assert "Other<7B>" not in html


def test_figures_carry_their_data(page):
    files = {
        name: list(csv.DictReader(io.StringIO(unquote(data))))
        for name, data in re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]*)"', page)
    }
    report = model_report()
    kurtosis = files[f"kurtosis-{MODEL}.csv"]
    assert [float(row["kurtosis"]) for row in kurtosis] == [row["kurtosis"] for row in report.statistics]
    allocation = files[f"allocation-{MODEL}-mxq-uniform-b4g64.csv"]
    rows = report.allocations["mxq @ uniform b4g64"]
    assert [int(row["size_bytes"]) for row in allocation] == [row["size_bytes"] for row in rows]
    assert files["variants.csv"][0]["kl_divergence"] == ""
    assert len(files["stages-demo.csv"]) == len(report_data().stages)
    costs = report.costs["sequence_fisher"]
    fisher = files[f"sequence-fisher-{MODEL}.csv"]
    assert float(fisher[5]["b4g64"]) == pytest.approx(costs.cost[5, costs.specs.index(STOPS[7])], rel=1e-5)


def test_modules_measured_together_share_a_panel(page):
    assert ">q_proj, k_proj, v_proj</text>" in page
    assert ">gate_proj, up_proj</text>" in page


def test_one_configuration_is_drawn_per_width():
    assert [spec.name for spec in one_per_width(STOPS)] == ["b2g64", "b3g64", "b4g64", "b8g64"]


def test_stage_times_are_summed_over_what_ran():
    stages = [
        StageTiming(stage="fisher", label="layer 0", state="ran", seconds=90.0, size_bytes=1_000_000),
        StageTiming(stage="fisher", label="layer 1", state="cached", seconds=500.0, size_bytes=1_000_000),
    ]
    text = plain(build_report(ReportData(run="r", results=[], stages=stages)))
    assert "1 of 2 stages ran, 1 min 30 s in all; 1 came from the cache. The run keeps 2.0 MB." in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.42, "0.4 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7440, "2 h 04 min")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.fixture(scope="module")
def file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


SORT = """
(() => {
  const table = [...document.querySelectorAll("table")].find((one) => one.caption.textContent === "Variants");
  const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === "Perplexity");
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const shown = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.v ?? null);
  button.focus();
  const focused = document.activeElement === button;
  const seen = [focused];
  for (let click = 0; click < 2; click++) {
    button.click();
    seen.push([shown(), button.parentElement.getAttribute("aria-sort")]);
  }
  return seen;
})()
"""


def test_tables_sort_in_a_browser_with_missing_values_last(file, tab):
    tab.open(file)
    focused, (rising, rising_sign), (falling, falling_sign) = tab.run(SORT)
    perplexities = sorted(result.perplexity for result in results())
    assert focused
    assert [None if value is None else float(value) for value in rising] == [*perplexities, None]
    assert [None if value is None else float(value) for value in falling] == [*perplexities[::-1], None]
    assert (rising_sign, falling_sign) == ("ascending", "descending")
    assert tab.problems == []


BRIGHTNESS = """
(() => {
  const grey = (colour) => Number(colour.match(/\\d+/)[0]);
  const style = (name) => getComputedStyle(document.querySelector(name));
  return [grey(style("body").backgroundColor), grey(style("svg text").fill)];
})()
"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1280, True), (1280, False)])
def test_the_page_fits_the_screen_in_both_themes(file, tab, width, dark):
    tab.open(file, width=width, dark=dark)
    background, ink = tab.run(BRIGHTNESS)
    assert (background < ink) is dark
    assert tab.run(OVERFLOW) == 0
    assert tab.problems == []


def test_the_browser_notices_what_goes_wrong(tmp_path, tab):
    broken = tmp_path / "broken.html"
    broken.write_text('<script>console.error("no"); f()</script><img src="missing.png">')
    tab.open(broken)
    found = " ".join(tab.problems)
    assert all(kind in found for kind in ("console.error", "script error", "request:", "failed request"))
