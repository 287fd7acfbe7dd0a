"""Figures of measurements and results. Each function returns a `matplotlib.figure.Figure`; none touches pyplot."""

from lmq.report.figures.allocation_map import allocation_map, difference_map
from lmq.report.figures.importance import importance_bands
from lmq.report.figures.palette import theme_css
from lmq.report.figures.perplexity import perplexity_by_size
from lmq.report.figures.profiles import cost_curves, layer_curve
from lmq.report.figures.svg import figure_png, figure_svg

__all__ = [
    "allocation_map",
    "cost_curves",
    "difference_map",
    "figure_png",
    "figure_svg",
    "importance_bands",
    "layer_curve",
    "perplexity_by_size",
    "theme_css",
]
