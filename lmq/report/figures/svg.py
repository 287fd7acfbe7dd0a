"""Writing a figure as compact SVG that follows the page's colours and font, or as PNG.

Matplotlib's own SVG writer takes its identifiers and text mode from global settings, names ids that clash when
two figures share a page, and fixes colours. This renderer writes paths and real text only: the same figure gives
the same bytes, in any thread.
"""

from __future__ import annotations

import html
from pathlib import Path as FilePath
from typing import Any

from matplotlib.backend_bases import GraphicsContextBase, RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, Transform

from lmq.report.figures.palette import BY_LIGHT

_TEXT_ANCHOR = {"left": "start", "center": "middle", "right": "end"}


def figure_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element without ids, scripts or dates; its label becomes the accessible name.

    Colours of `lmq.report.figures.palette` become CSS variables and the font is the page's. Nothing is clipped or
    rasterised. The figure's dpi must be 72, as `lmq.report.figures.canvas` makes it: one unit is one CSS pixel.
    """
    width, height = figure.get_size_inches() * 72
    renderer = _SvgRenderer(width, height)
    figure.draw(renderer)
    label = html.escape(str(figure.get_label()))
    body = "\n".join(renderer.elements)
    return f'<svg viewBox="0 0 {_short(width)} {_short(height)}" role="img" aria-label="{label}">\n{body}\n</svg>'


def figure_png(figure: Figure, path: FilePath, *, dots_per_inch: int = 160) -> None:
    """Write the figure in its light colours as PNG; no date or version goes into the file."""
    FigureCanvasAgg(figure).print_figure(path, dpi=dots_per_inch, facecolor="white", metadata={"Software": None})


class _SvgRenderer(RendererBase):
    """Collects SVG elements; y grows downwards."""

    def __init__(self, width: float, height: float):
        super().__init__()
        self.width, self.height = width, height
        self.elements: list[str] = []

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self.width, self.height

    def draw_path(self, gc: GraphicsContextBase, path: Path, transform: Transform, rgbFace: Any = None) -> None:  # noqa: N803
        style = _paint(gc, rgbFace)
        commands = _path_commands(path, transform + Affine2D().scale(1, -1).translate(0, self.height))
        if style and commands:
            self.elements.append(f'<path d="{commands}" style="{style}"/>')

    def draw_text(
        self,
        gc: GraphicsContextBase,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: Any = False,
        mtext: Text | None = None,
    ) -> None:
        anchor = ""
        if mtext is not None and angle == 0:
            x = float(mtext.get_transform().transform(mtext.get_unitless_position())[0])
            anchor = f' text-anchor="{_TEXT_ANCHOR[mtext.get_horizontalalignment()]}"'
        weight = ";font-weight:600" if prop.get_weight() == "bold" else ""
        turn = f' transform="rotate({_short(-angle)} {_short(x)} {_short(y)})"' if angle else ""
        style = f"fill:{_css_colour(gc.get_rgb())};font-size:{_short(prop.get_size_in_points())}px{weight}"
        self.elements.append(
            f'<text x="{_short(x)}" y="{_short(y)}"{anchor}{turn} style="{style}">{html.escape(s)}</text>'
        )


def _paint(gc: GraphicsContextBase, face: Any) -> str:
    """CSS of fill and stroke; empty when nothing would be seen."""
    fill = _css_colour(face) if face is not None and (len(face) == 3 or face[3] > 0) else None
    stroke = _css_colour(gc.get_rgb()) if gc.get_linewidth() > 0 and gc.get_rgb()[3] > 0 else None
    if fill is None and stroke is None:
        return ""
    style = f"fill:{fill or 'none'}"
    if stroke is not None:
        style += f";stroke:{stroke};stroke-width:{_short(gc.get_linewidth())}"
        dashes: Any = gc.get_dashes()[1]
        if dashes is not None:
            style += f";stroke-dasharray:{' '.join(map(_short, dashes))}"
    alpha = gc.get_rgb()[3] if fill is None or len(face) == 3 else face[3]
    return style if alpha >= 1 else f"{style};opacity:{alpha:.2f}"


def _css_colour(colour: Any) -> str:
    hexadecimal = to_hex(tuple(colour)[:3])
    known = BY_LIGHT.get(hexadecimal)
    return known.css if known else hexadecimal


_COMMANDS = {int(Path.MOVETO): "M", int(Path.LINETO): "L", int(Path.CURVE3): "Q", int(Path.CURVE4): "C"}


def _path_commands(path: Path, transform: Transform) -> str:
    commands = []
    for vertices, code in path.iter_segments(transform, remove_nans=True, simplify=False):
        numbers = " ".join(_short(float(value)) for value in vertices)
        commands.append("Z" if code == Path.CLOSEPOLY else _COMMANDS[int(code)] + numbers)
    return "".join(commands)


def _short(value: float) -> str:
    """At most one decimal, no trailing zero: a tenth of a pixel is finer than any screen shows."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
