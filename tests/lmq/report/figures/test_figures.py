from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.allocation.error_table import ErrorTable
from lmq.formats.spec import STOPS, QuantSpec
from lmq.model.structure import ModuleId
from lmq.report.figures import (
    allocation_map,
    cost_curves,
    difference_map,
    figure_png,
    figure_svg,
    layer_curve,
    perplexity_by_size,
    theme_css,
)
from lmq.report.figures.allocation_map import short_kind
from lmq.report.figures.canvas import number_text
from lmq.report.figures.labels import CHARACTER_PX, Box, place_names
from lmq.report.figures.palette import (
    ALERT,
    ALL,
    CHANGE_EDGES,
    INK,
    MARKERS,
    MUTED,
    SERIES,
    SURFACE,
    change_colour,
    series_style,
)
from lmq.report.figures.perplexity import strategy_styles
from tests.lmq.report.synthetic_report import MODEL, error_table, results, structure

KINDS = ("self_attn.q_proj", "mlp.down_proj")


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def scatter():
    made = results(count=21)
    return perplexity_by_size(made, model=MODEL, styles=strategy_styles(made))


def test_svg_holds_text_and_theme_colours_and_nothing_that_changes():
    svg = figure_svg(scatter())
    assert "full precision 29.19" in texts(svg)
    assert "loss-aware" in texts(svg)
    assert "var(--series-0,#0072b2)" in svg
    assert not {"id", "href", "clip-path"} & {
        key for element in ElementTree.fromstring(svg).iter() for key in element.attrib
    }
    assert svg == figure_svg(scatter())


def test_figures_are_the_same_from_threads_and_leave_settings_alone():
    settings = dict(matplotlib.rcParams)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: figure_svg(scatter()), range(8)))
    assert set(made) == {figure_svg(scatter())}
    assert dict(matplotlib.rcParams) == settings


def test_png_bytes_are_the_same_every_time(tmp_path):
    figure_png(scatter(), tmp_path / "a.png")
    figure_png(scatter(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_points_stand_where_their_values_are():
    made = results(count=6)
    figure = perplexity_by_size(made, model=MODEL, styles=strategy_styles(made))
    axes = figure.axes[0]
    points = {tuple(np.round(line.get_xydata()[0], 6)) for line in axes.lines if line.get_marker() in MARKERS}
    expected = {(round(r.size_bytes / 1e6, 6), round(r.perplexity, 6)) for r in made[1:]}
    assert points == expected
    assert axes.get_yscale() == "log"


def test_sizes_that_differ_by_bytes_are_not_magnified():
    _, first, *_ = made = results(count=6)
    same = [replace(result, size_bytes=first.size_bytes + step) for step, result in enumerate(made)]
    low, high = perplexity_by_size(same, model=MODEL, styles={}).axes[0].get_xlim()
    assert high - low == pytest.approx(0.05 * first.size_bytes / 1e6, rel=0.05)


def test_a_scatter_without_measurements_says_so():
    svg = figure_svg(perplexity_by_size(results(count=1), model=MODEL, styles={}))
    assert "not measured" in texts(svg)


def test_outlier_layers_are_ringed_and_numbered():
    figure = layer_curve([3.0, 9.0, None, 3.1], title="down_proj", quantity="kurtosis", outlier_layers=[1, 2])
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text().isdigit()] == ["1"]
    assert figure.axes[0].get_yscale() == "linear"
    wide = layer_curve([1e-4, 1e-2, 1e-1], title="q_proj", quantity="sensitivity")
    assert wide.axes[0].get_yscale() == "log"


def test_a_curve_without_measurements_says_so():
    assert "not measured" in texts(figure_svg(layer_curve([None, None], title="q", quantity="kurtosis")))


def test_cost_curves_draw_the_table():
    model = structure(4)
    table = error_table(model, 3.0, 2)
    spec = QuantSpec(4, 64)
    figure = cost_curves(table, "mlp.down_proj", specs=[spec], layers=4, title="down_proj")
    rows = [row for row, module in enumerate(table.modules) if module.kind == "mlp.down_proj"]
    drawn = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 1], table.cost[rows, table.specs.index(spec)])
    assert drawn[:, 0].tolist() == [0, 1, 2, 3]


def test_costs_of_zero_are_left_out_of_the_log_scale():
    modules = (ModuleId(0, "k"), ModuleId(1, "k"))
    sizes = np.ones((2, 1), dtype=np.int64)
    table = ErrorTable(modules, (QuantSpec(4, 64),), np.array([[0.0], [2.0]]), sizes)
    figure_svg(cost_curves(table, "k", specs=table.specs, layers=2, title="k"))
    nothing = ErrorTable(modules, table.specs, np.zeros((2, 1)), sizes)
    assert "no cost above 0" in texts(figure_svg(cost_curves(nothing, "k", specs=table.specs, layers=2, title="k")))


def test_neighbours_of_one_configuration_share_a_shape():
    low, high = QuantSpec(3, 64), QuantSpec(4, 64)
    allocation = {ModuleId(layer, kind): low for layer in range(10) for kind in KINDS}
    allocation[ModuleId(4, KINDS[1])] = high
    figure = allocation_map(allocation, kinds=KINDS, layers=10, scale=[low, high], label="map")
    boxes = [patch.get_path().vertices.reshape(-1, 5, 2) for patch in figure.axes[0].patches]
    spans = sorted((box[0, 0] + 0.5, box[1, 0] - 0.5) for boxes_of in boxes for box in boxes_of)
    assert spans == [(0, 3), (0, 9), (4, 4), (5, 9)]


def test_maps_leave_out_modules_without_a_configuration():
    figure = difference_map({ModuleId(1, KINDS[0]): 1.0}, kinds=KINDS, layers=3, label="map")
    assert len(figure.axes[0].patches) == 1


def test_difference_colours_grow_with_the_difference():
    steps = [-2.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.0]
    assert [int(change_colour(step).name.removeprefix("change-")) for step in steps] == list(range(7))
    assert change_colour(CHANGE_EDGES[0] / 2) == change_colour(0.0)


def test_every_colour_has_its_own_light_form_and_both_themes():
    assert len({colour.light for colour in ALL}) == len(ALL)
    assert all(theme_css().count(f"--{colour.name}:") == 3 for colour in ALL)


def luminance(hexadecimal):
    channels = [int(hexadecimal[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_suffices_for_text_and_for_marks(theme):
    """WCAG 2.1 AA: 4.5 for text, 3 for what a figure is read from."""

    def contrast(colour):
        low, high = sorted(luminance(getattr(one, theme)) for one in (colour, SURFACE))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(colour) >= 4.5 for colour in (INK, MUTED, ALERT, SERIES[0]))
    assert all(contrast(colour) >= 3 for colour in SERIES)


def test_series_styles_differ_for_36_series():
    assert len({(style.colour, style.marker) for style in map(series_style, range(36))}) == 36


def test_short_kinds_stay_unique():
    assert short_kind("self_attn.q_proj", KINDS) == "q_proj"
    assert short_kind("a.proj", ("a.proj", "b.proj")) == "a.proj"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0001, "0.0001"), (1e-7, "1e−7"), (3000, "3,000"), (2.5e8, "2.5e8"), (-0.5, "−0.5")]
)
def test_tick_numbers(value, text):
    assert number_text(value) == text


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200), st.text("abc", min_size=1, max_size=12)), max_size=25))
def test_names_never_overlap_or_leave_the_frame(points):
    frame = Box(0, 0, 300, 200)
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    placed = [place.box for _, place in place_names(points, frame=frame, taken=marks)]
    for index, box in enumerate(placed):
        assert box.inside(frame)
        assert not any(box.overlaps(other) for other in [*placed[:index], *marks])


def test_a_lone_point_is_named_to_its_right():
    [(name, place)] = place_names([(50, 50, "mxq")], frame=Box(0, 0, 200, 100), taken=[])
    assert (name, place.side) == ("mxq", "left")
    assert place.box.right - place.box.left == pytest.approx(4 * CHARACTER_PX)


def test_all_stops_fit_the_ramp():
    allocation = {ModuleId(layer, "k"): spec for layer, spec in enumerate(STOPS)}
    figure = allocation_map(allocation, kinds=["k"], layers=12, scale=STOPS, label="map")
    assert len({patch.get_facecolor() for patch in figure.axes[0].patches}) == 12
