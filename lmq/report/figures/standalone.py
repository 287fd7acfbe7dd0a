"""Figures as an SVG file of its own: stacked, with the project's colours for light and dark viewers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lmq.report.figures.palette import SURFACE, theme_css
from lmq.report.figures.svg import figure_svg

_PADDING_PX = 16


def standalone_svg(figures: Sequence[Figure], *, columns: int = 1) -> str:
    """Text of an SVG file that holds the figures in rows of `columns`, left-aligned, one row below the other."""
    sizes = [figure.get_size_inches() * 72 for figure in figures]
    column_px = max(size[0] for size in sizes) + _PADDING_PX
    width = min(columns, len(figures)) * column_px + _PADDING_PX
    parts, height = [], float(_PADDING_PX)
    for start in range(0, len(figures), columns):
        row = slice(start, start + columns)
        for column, (figure, size) in enumerate(zip(figures[row], sizes[row], strict=True)):
            left = _PADDING_PX + column * column_px
            place = f'x="{left:g}" y="{height:g}" width="{size[0]:g}" height="{size[1]:g}" overflow="visible"'
            parts.append(figure_svg(figure).replace("<svg ", f"<svg {place} ", 1))
        height += max(size[1] for size in sizes[row]) + _PADDING_PX
    style = f"{theme_css()}text{{font-family:sans-serif}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="{SURFACE.css}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
