"""Figures as an SVG file of its own: stacked, with the project's colours for light and dark viewers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lmq.plots.palette import SURFACE, theme_css
from lmq.plots.svg import figure_svg

_PADDING_PX = 16


def standalone_svg(figures: Sequence[Figure]) -> str:
    """Text of an SVG file that holds the figures one below the other, left-aligned."""
    sizes = [figure.get_size_inches() * 72 for figure in figures]
    width = max(size[0] for size in sizes) + 2 * _PADDING_PX
    height = sum(size[1] for size in sizes) + (len(figures) + 1) * _PADDING_PX
    parts, top = [], _PADDING_PX
    for figure, size in zip(figures, sizes, strict=True):
        place = f'x="{_PADDING_PX}" y="{top:g}" width="{size[0]:g}" height="{size[1]:g}" overflow="visible"'
        parts.append(figure_svg(figure).replace("<svg ", f"<svg {place} ", 1))
        top += size[1] + _PADDING_PX
    style = f"{theme_css()}text{{font-family:sans-serif}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="{SURFACE.css}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
