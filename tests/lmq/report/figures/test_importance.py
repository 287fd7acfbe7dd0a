import math
from xml.etree import ElementTree

import numpy as np

from lmq.report.figures.importance import importance_bands
from lmq.report.figures.svg import figure_svg

METRICS = {
    "AVSS": [1.0, 100.0, 10.0, 1.0],
    "Shapley": [-1.0, None, 0.0, 3.0],
    "constant": [2.0] * 4,
    "missing": [None] * 4,
}


def test_every_metric_fills_a_band_of_its_own() -> None:
    figure = importance_bands(METRICS, title="model")
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 4]
    heights = [np.asarray(line) - np.nanmin(line) for line in drawn]
    np.testing.assert_allclose(heights[0], [0, 48, 24, 0], atol=1e-9)  # logarithmic
    np.testing.assert_allclose(heights[1], [0, math.nan, 12, 48], atol=1e-9)
    np.testing.assert_allclose(heights[2], [0, 0, 0, 0])
    assert np.nanmin(drawn[0]) > np.nanmax(drawn[1]) > np.nanmin(drawn[1]) > drawn[2][0]


def test_names_and_ends_of_the_scales_are_written() -> None:
    svg = figure_svg(importance_bands(METRICS, title="model"))
    texts = {element.text for element in ElementTree.fromstring(svg).iter("text")}
    assert {"model", "AVSS (log scale)", "Shapley", "constant", "missing (not measured)"} <= texts
    assert {"1", "100", "−1", "3", "2"} <= texts
    assert svg == figure_svg(importance_bands(METRICS, title="model"))


def test_removed_layers_are_shaded_once_per_run_of_neighbours() -> None:
    figure = importance_bands(METRICS, title="model", removed_layers=[3, 0, 1])
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in figure.axes[0].patches)
    assert spans == [(-0.5, 1.5), (2.5, 3.5)]
    assert "shaded: removed layers" in figure_svg(figure)
