from __future__ import annotations

import pytest

from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId
from lmq.report.figures.standalone import standalone_svg
from lmq.report.figures.study import cost_scatters, sensitivity_figures, setting_names
from lmq.report.figures.svg import figure_svg
from lmq.report.sections.study import costs_page, sensitivity_page
from lmq.report.study import CostPair, Setting, agreements, cost_qualities, summarize_agreements


def setting(quantizer: str, configuration: str = "b4g64") -> Setting:
    return Setting(model="m", text="pydoc-topics", quantizer=quantizer, configuration=configuration)


PROFILES = {
    setting(quantizer): {"attn_in": [1.0, 2.0, shift, 8.0], "mlp_down": [1e-5, None, 3e-3, 0.0]}
    for quantizer, shift in (("hqq", 4.0), ("<nf4>", 5.0))
}
PAIRS = [
    CostPair(
        module=ModuleId(layer, "mlp.up_proj"),
        spec=QuantSpec(bits, 64),
        exact=10.0**-bits * (layer + 1),
        exact_stderr=None,
        cheap={"Fisher": 7.0**-bits * (layer + 1), "zero": 0.0},
    )
    for layer in range(3)
    for bits in (2, 3)
]


def test_settings_are_named_by_what_differs() -> None:
    assert list(setting_names([setting("hqq"), setting("rtn")]).values()) == ["hqq", "rtn"]
    assert list(setting_names([setting("hqq", "b3g64"), setting("rtn")]).values()) == ["hqq · b3g64", "rtn · b4g64"]
    assert list(setting_names([setting("hqq")]).values()) == ["m"]


def test_every_part_has_a_panel_with_a_line_per_setting() -> None:
    legend, *panels = sensitivity_figures(PROFILES)
    assert "&lt;nf4&gt;" in figure_svg(legend)
    assert [len(panel.axes[0].lines) for panel in panels] == [2, 2]
    first = panels[0].axes[0].lines[0].get_ydata()
    assert first[3] / first[0] == pytest.approx(8)
    assert first[0] * first[1] * first[2] * first[3] == pytest.approx(1)


def test_scatters_leave_out_what_a_log_scale_has_no_place_for() -> None:
    qualities = cost_qualities(PAIRS, resamples=10)
    drawn = dict(zip([quality.cost for quality in qualities], cost_scatters(PAIRS, qualities), strict=True))
    assert sum(len(line.get_xdata()) for line in drawn["Fisher"].axes[0].lines) == 6
    assert "6 pairs at 0 or below not drawn" in figure_svg(drawn["zero"])
    assert "not defined" in figure_svg(drawn["zero"])


def test_figures_stand_in_columns() -> None:
    figures = cost_scatters(PAIRS, cost_qualities(PAIRS, resamples=10))
    assert 'width="688"' in standalone_svg(figures, columns=2)
    assert 'width="352"' in standalone_svg(figures)
    assert standalone_svg(figures, columns=2).count("<svg ") == 3


def test_pages_hold_table_and_figures_and_escape_names() -> None:
    page = sensitivity_page(summarize_agreements(agreements(PROFILES)), sensitivity_figures(PROFILES), ["a < b"])
    assert page.count("<svg ") == 3
    assert "hqq – &lt;nf4&gt;" in page
    assert "a &lt; b" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    qualities = cost_qualities(PAIRS, resamples=10)
    page = costs_page(qualities, cost_scatters(PAIRS, qualities))
    assert page.count("<svg ") == 2
    assert "Within a configuration" in page
