"""Colours of the figures, each with a light and a dark form.

Figures are drawn in the light colours; `lmq.report.figures.svg` writes every one of them as a CSS variable, so that
the page that holds the figure chooses. Series follow Okabe and Ito (2008), readable with any colour vision;
each also has a marker of its own, so that no figure depends on colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, to_hex


@dataclass(frozen=True)
class Colour:
    """A named colour: `light` is for a light page, `dark` for a dark one, as `#rrggbb`."""

    name: str
    light: str
    dark: str

    @property
    def css(self) -> str:
        """The CSS value, falling back to the light form outside a themed page."""
        return f"var(--{self.name},{self.light})"


INK = Colour("ink", "#1b1f24", "#e7e9ec")
MUTED = Colour("muted", "#5c6570", "#9aa4b0")
RULE = Colour("rule", "#dfe3e8", "#30363e")
SURFACE = Colour("surface", "#fdfdfc", "#14171b")
ALERT = Colour("alert", "#b34700", "#ff9a5c")

SERIES = (
    Colour("series-0", "#0072b2", "#4fb3ee"),
    Colour("series-1", "#d55e00", "#ff8f4a"),
    Colour("series-2", "#009e73", "#3ccfa4"),
    Colour("series-3", "#b8578f", "#e69ac4"),
    Colour("series-4", "#b57c00", "#f2b632"),
    Colour("series-5", "#3f9bd0", "#9bd4f7"),
)
MARKERS = ("o", "^", "D", "v", "P", "s")
MARKER_GLYPHS = ("●", "▲", "◆", "▼", "✚", "■")

_LEVELS = 12
_WIDTHS = 3


def _ramp() -> tuple[Colour, ...]:
    colours = colormaps["YlGnBu"]
    positions = [0.1 + 0.86 * step / (_LEVELS - 1) for step in range(_LEVELS)]
    hexes = [to_hex(colours(position)) for position in positions]
    return tuple(
        Colour(f"ramp-{step}", light, dark)
        for step, (light, dark) in enumerate(zip(hexes, reversed(hexes), strict=True))
    )


def _diverging() -> tuple[Colour, ...]:
    light = LinearSegmentedColormap.from_list("light", ["#b35806", "#f3b774", "#eceef0", "#84b4de", "#0b4f94"])
    dark = LinearSegmentedColormap.from_list("dark", ["#ffab57", "#96602c", "#262b32", "#2f6da8", "#7cc4ff"])
    steps = 2 * _WIDTHS + 1
    return tuple(
        Colour(f"change-{step}", to_hex(light(step / (steps - 1))), to_hex(dark(step / (steps - 1))))
        for step in range(steps)
    )


RAMP = _ramp()
"""Twelve levels from few bits (near the page's colour) to many."""
DIVERGING = _diverging()
"""Fewer bits (orange), the same (grey), more bits (blue)."""

ALL = (INK, MUTED, RULE, SURFACE, ALERT, *SERIES, *RAMP, *DIVERGING)
BY_LIGHT = {colour.light: colour for colour in ALL}


def theme_css() -> str:
    """CSS that defines every colour for light and dark pages; print is always light.

    The reader's system chooses, unless the root element has `data-theme="light"` or `"dark"`.
    """
    light = "".join(f"--{colour.name}:{colour.light};" for colour in ALL)
    dark = "".join(f"--{colour.name}:{colour.dark};" for colour in ALL)
    return (
        f":root{{{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n"
    )


def ramp_colour(rank: int, count: int) -> Colour:
    """Colour of the `rank`-th of `count` ordered values."""
    return RAMP[round(rank * (_LEVELS - 1) / max(count - 1, 1))] if count > 1 else RAMP[_LEVELS // 2]


def change_colour(difference_bits: float) -> Colour:
    """Colour of a difference in bits per weight: grey within 0.005, then three steps up to 0.5, up to 1.5, more."""
    size = abs(difference_bits)
    step = sum(size > edge for edge in CHANGE_EDGES)
    return DIVERGING[_WIDTHS + (step if difference_bits > 0 else -step)]


CHANGE_EDGES = (0.005, 0.5, 1.5)


@dataclass(frozen=True)
class SeriesStyle:
    """Colour and marker of one series; `glyph` is the marker as a character, for legends in text."""

    colour: Colour
    marker: str
    glyph: str


def series_style(index: int) -> SeriesStyle:
    """Style of the `index`-th series: colours repeat after six, then with other markers."""
    marker = (index + index // len(SERIES)) % len(MARKERS)
    return SeriesStyle(SERIES[index % len(SERIES)], MARKERS[marker], MARKER_GLYPHS[marker])
