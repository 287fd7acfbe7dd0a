"""Parts of the report: how sure the answer is, costs, importance, weights, performance, any two variants."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from lmq.allocation.error_table import ErrorTable
from lmq.evaluation.task_scores import TaskScore
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId
from lmq.outliers import find_outlier_layers
from lmq.report.data import PairedDifference, ReportData
from lmq.report.figures.palette import CHANGE_EDGES
from lmq.report.page import build_report
from lmq.report.sections.certainty import paired_verdict
from lmq.report.sections.costs import COSTS, cost_outliers, likely_spec
from lmq.report.sections.downloads import embedded_files
from lmq.report.sections.importance import ranking
from lmq.report.sections.pictures import report_pictures
from tests.lmq.report.synthetic_report import MODEL, model_report, report_data, results
from tests.lmq.report.test_report import plain


@pytest.fixture(scope="module")
def data():
    return report_data()


@pytest.fixture(scope="module")
def page(data):
    return build_report(data)


def table_of(page, caption):
    """Rows of plain cells of the table with this caption."""
    found = re.search(rf"<caption>{re.escape(caption)}</caption>(.*?)</table>", page, re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.S)
    return [[plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def allocation_of(model, label):
    rows = model.allocations[label]
    return {ModuleId(row["layer"], row["kind"]): QuantSpec(row["bits"], row["group_size"]) for row in rows}


@pytest.mark.parametrize(
    ("difference", "verdict"), [(-0.05, "better"), (0.05, "worse"), (0.02, "not told apart"), (-0.02, "not told apart")]
)
def test_two_standard_errors_decide(difference, verdict):
    pair = PairedDifference(model="m", variant="a", baseline="b", difference=difference, stderr=0.01)
    assert paired_verdict(pair) == verdict


def test_paired_differences_are_shown_as_ratios_of_perplexity(page):
    _, *rows = table_of(page, "Against uniform at the same budget, window by window")
    made = {result.label: result for result in results()}
    row = next(row for row in rows if row[0] == "loss-aware @ uniform b4g64")
    ratio = made[row[0]].perplexity / made["uniform b4g64"].perplexity
    assert row[2].startswith(f"{100 * (ratio - 1):.1f}%".replace("-", "−"))
    assert row[-1] == "better"


def test_the_front_and_who_wins_stand_on_the_run_s_own_page(data):
    page = build_report(replace(data, models=[], results=results(count=11)))
    front = re.findall(r"<li>([\d.]+ MB): <strong>([^<]+)</strong>, perplexity", plain_tags(page))
    sizes = [float(size.removesuffix(" MB")) for size, _ in front]
    assert sizes == sorted(sizes)
    assert len(front) >= 2
    _, *rows = table_of(page, "Wins, ties and losses")
    counts = {(row[0], row[1]): tuple(map(int, row[2:])) for row in rows}
    assert counts["loss-aware", "uniform"] == (2, 0, 0)
    assert counts["uniform", "loss-aware"] == (0, 0, 2)


def test_a_boost_is_compared_at_its_own_bytes():
    made = results(count=6)
    larger = replace(made[1], budget="uniform b4g32", size_bytes=70_000_000, perplexity=33.0)
    _, *rows = table_of(build_report(ReportData(run="r", results=[*made, larger])), "Against uniform at equal bytes")
    row = next(row for row in rows if row[0].startswith("sensi-boost"))
    share = (made[4].size_bytes - made[1].size_bytes) / (larger.size_bytes - made[1].size_bytes)
    rival = made[1].perplexity ** (1 - share) * 33.0**share
    assert row[3] == f"{rival:.2f}"
    assert row[5] == "uniform b4g64 and uniform b4g32"


def plain_tags(page):
    return page.replace('<span class="figure">', "").replace("</span>", "")


def test_outlier_layers_of_a_cost_follow_the_papers_rule():
    profile = np.array([1.0, 1.1, 1.0, 0.9, 1.0, 30.0, 1.0, 1.1, 1.0, 1.05, 1.0, 0.95])
    modules = tuple(ModuleId(layer, "mlp.down_proj") for layer in range(len(profile)))
    spec = QuantSpec(4, 64)
    table = ErrorTable(modules, (spec,), profile[:, None], np.ones((len(profile), 1), dtype=np.int64))
    assert cost_outliers(table, spec) == {"mlp.down_proj": find_outlier_layers(profile, difference="divide")}
    assert 5 in cost_outliers(table, spec)["mlp.down_proj"]
    with_zero = replace(table, cost=np.where(profile == 30, 0.0, profile)[:, None])
    assert cost_outliers(with_zero, spec) == {}


def test_the_costliest_modules_come_with_what_the_variants_gave_them(page, data):
    model = data.models[0]
    costs = model.costs["sequence_fisher"]
    spec = likely_spec(costs.specs)
    values = {module: costs.cost[row, costs.specs.index(spec)] for row, module in enumerate(costs.modules)}
    heads, *rows = table_of(page, "The 12 modules of highest cost, and what the variants gave them")
    expected = sorted(values, key=lambda module: -values[module])[:12]
    assert [row[0] for row in rows] == [f"layer {m.layer} {m.kind.rpartition('.')[2]}" for m in expected]
    label = "mxq @ uniform b4g64"
    given = {
        ModuleId(row["layer"], row["kind"]): f"b{row['bits']}g{row['group_size']}" for row in model.allocations[label]
    }
    assert [row[heads.index(label)] for row in rows] == [given[module] for module in expected]


def test_agreement_of_costs_is_spearmans(page, data):
    heads, *rows = table_of(page, "Do the costs agree?")
    first, second = (data.models[0].costs[name] for name in ("sequence_fisher", "divergence"))
    column = first.specs.index(likely_spec(first.specs))
    rho = spearmanr(first.cost[:, column], second.cost[:, column]).statistic
    row = next(row for row in rows if row[0] == COSTS["divergence"].title)
    assert row[heads.index(COSTS["sequence_fisher"].title)] == f"{rho:.2f}".replace("-", "−")


def test_ranks_agree_with_scipy():
    values = [0.3, 2.0, 0.3, -1.0, 5.0]
    assert ranking(values) == [int(rank) for rank in rankdata([-value for value in values], method="ordinal")]


def test_importance_and_super_weights_and_grids_are_told(page):
    text = plain(page)
    assert "Block Influence: 29, 0," in text
    assert "In 1 of 30 modules both spikes are 100 times the root mean square or more" in text
    _, *rows = table_of(page, "Large weights by kind")
    assert [row[-1] for row in rows if row[0] == "up_proj"] == ["30 of 30 at b4g32"]
    assert [row[-1] for row in rows if row[0] == "q_proj"] == ["none"]


def test_performance_and_tasks_are_shown_where_they_were_measured(data):
    scores = (
        TaskScore(task="arc_easy", metric="acc", value=0.5, stderr=0.01, samples=2376),
        TaskScore(task="piqa", error="the data is not at hand"),
    )
    measured = replace(
        results()[1],
        memory_resident_bytes=200_000_000,
        generation_tokens_per_second=12.34,
        performance_host="a <machine>",
        tasks=scores,
    )
    page = build_report(ReportData(run="r", results=[results()[0], measured]))
    _, row = table_of(page, "Memory and speed")
    assert row[0] == "uniform b4g64"
    assert row[3:] == ["200.0 MB", "–", "–", "12.3"]
    assert "a &lt;machine&gt;" in page
    heads, row = table_of(page, "Zero-shot tasks")
    assert heads == ["Variant", "arc_easy acc"]
    assert row[1] == "50.0% ± 1.0%"
    assert "piqa: the data is not at hand" in page
    assert embedded_files(page)["tasks.csv"].count("\n") == 3
    text = plain(build_report(ReportData(run="r", results=results())))
    assert "Memory and speed: not measured in this run." in text
    assert "Zero-shot tasks: not measured in this run." in text


def test_embedded_files_are_what_the_links_save(page, data):
    files = embedded_files(page)
    assert len(files) == page.count("download=")
    stages = list(csv.DictReader(io.StringIO(files[f"stages-{data.run}.csv"])))
    assert [row["stage"] for row in stages] == [stage.stage for stage in data.stages]
    assert max(float(row["peak_memory_bytes"] or 0) for row in stages) == 1_200_000_000


def test_peak_memory_is_the_largest_that_is_known(page):
    heads, *rows = table_of(page, "Time and bytes by stage")
    peaks = {row[0]: row[heads.index("Peak memory")] for row in rows}
    assert peaks["fisher"] == "1,200.0 MB"
    assert peaks["kurtosis"] == "–"


def test_pictures_are_standalone_and_leave_out_flat_maps(data):
    pictures = report_pictures(data)
    assert {name.removeprefix(f"{MODEL}-") for name in pictures} >= {"perplexity", "cost", "kurtosis", "importance"}
    assert not any(name.removeprefix(f"{MODEL}-allocation-") == "uniform-b4g64" for name in pictures)
    assert all(svg.startswith("<svg xmlns=") and len(svg) < 150_000 for svg in pictures.values())


CHOOSE = """
((first, second) => {
  const part = document.querySelector(".chooser");
  const choices = [...part.querySelectorAll("select")];
  const pick = (choice, label) => {
    choice.value = [...choice.options].find((option) => option.text === label).value;
    choice.dispatchEvent(new Event("change"));
  };
  pick(choices[0], first);
  pick(choices[1], second);
  const boxes = [...part.querySelectorAll("rect")];
  return [part.hidden, part.querySelector(".said").textContent,
    boxes.map((box) => [box.style.fill, box.querySelector("title").textContent])];
})("loss-aware @ uniform b4g64", "kurt-boost @ uniform b4g64 +5%")
"""


def test_any_two_variants_are_compared_in_the_browser(page, data, tab, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    tab.open(file)
    hidden, said, boxes = tab.run(CHOOSE)
    model = data.models[0]
    first, second = (
        {
            ModuleId(row["layer"], row["kind"]): QuantSpec(row["bits"], row["group_size"])
            for row in model.allocations[label]
        }
        for label in ("loss-aware @ uniform b4g64", "kurt-boost @ uniform b4g64 +5%")
    )
    expected = []
    for kind in model.structure.kinds:
        for layer in range(model.structure.layers):
            a, b = first[ModuleId(layer, kind)], second[ModuleId(layer, kind)]
            change = a.bits_per_weight - b.bits_per_weight
            step = sum(abs(change) > edge for edge in CHANGE_EDGES) * (1 if change > 0 else -1)
            sign = "−" if change < 0 else "+"
            words = f"layer {layer} {kind}: {a} against {b}, {sign}{abs(change):.2f} bits per weight"
            expected.append([f"var(--change-{3 + step})", words])
    assert not hidden
    assert boxes == expected
    more = sum(first[module].bits_per_weight > second[module].bits_per_weight for module in first)
    assert f"has more bits than kurt-boost @ uniform b4g64 +5% in {more} modules" in said
    assert tab.problems == []


THEME = """
(() => {
  const button = document.querySelector("button.theme");
  const seen = [];
  for (let click = 0; click < 3; click++) {
    button.click();
    seen.push([button.textContent, Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]) > 128]);
  }
  return seen;
})()
"""


@pytest.mark.parametrize("dark", [True, False])
def test_the_theme_button_overrules_the_system(page, tab, tmp_path, dark):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    tab.open(file, dark=dark)
    assert tab.run(THEME) == [["Theme: light", True], ["Theme: dark", False], ["Theme: system", not dark]]


PRINTED = """
[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("svg text")).fill,
 getComputedStyle(document.querySelector("button.theme")).display]
"""


def test_paper_is_light_and_has_every_folded_part(page, tab, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    tab.open(file, dark=True)
    tab.run(
        "addEventListener('beforeprint', () => {"
        " window.unfolded = document.querySelectorAll('details:not([open])').length; })"
    )
    tab.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert tab.run("window.unfolded") == 0
    assert tab.run("document.querySelectorAll('details[open]').length") == 0
    tab.emulate(dark=True, media="print")
    background, ink, button = tab.run(PRINTED)
    assert (background, button) == ("rgb(255, 255, 255)", "none")
    assert max(map(int, re.findall(r"\d+", ink)[:3])) < 128
    tab.emulate()


def test_a_page_of_one_variant_has_nothing_to_choose_from():
    only = results()[3]
    report = replace(model_report(), allocations={only.label: model_report().allocations[only.label]})
    page = build_report(ReportData(run="one", results=[only], models=[report]))
    assert '<div class="chooser"' not in page
