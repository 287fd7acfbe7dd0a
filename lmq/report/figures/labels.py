"""Placing names beside points so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

CHARACTER_PX = 6.7
"""A generous width of a character at 11 px: the reader's font is not known."""
LINE_PX = 14.0

Side = Literal["left", "center", "right"]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share any area."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def inside(self, other: Box) -> bool:
        """Whether this lies wholly in `other`."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top


@dataclass(frozen=True)
class Place:
    """Where a name stands: its anchor and the side of the text that is anchored there."""

    x: float
    y: float
    side: Side
    box: Box


def place_names(
    points: Sequence[tuple[float, float, str]], *, frame: Box, taken: Sequence[Box]
) -> list[tuple[str, Place]]:
    """A place for each named point (x, y, name), earlier points first, clear of `taken` and of one another.

    A name for which none of the eight places around its point is free is left out.
    """
    occupied = list(taken)
    placed = []
    for x, y, name in points:
        for place in _places(x, y, (len(name) + 1) * CHARACTER_PX):
            if place.box.inside(frame) and not any(place.box.overlaps(box) for box in occupied):
                placed.append((name, place))
                occupied.append(place.box)
                break
    return placed


def boxes_along(points: Sequence[tuple[float, float]], step_px: float = 6.0) -> Iterator[Box]:
    """Small boxes that cover the line through the points."""
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = int(max(abs(x1 - x0), abs(y1 - y0)) / step_px) + 1
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            yield Box(x - 2, y - 2, x + 2, y + 2)


def _places(x: float, y: float, width: float) -> Iterator[Place]:
    """Best first: right, left, above, below, then the corners."""
    places: tuple[tuple[float, float, Side], ...] = (
        (9, 0, "left"),
        (-9, 0, "right"),
        (0, 15, "center"),
        (0, -15, "center"),
        (7, 12, "left"),
        (7, -12, "left"),
        (-7, 12, "right"),
        (-7, -12, "right"),
    )
    for across, up, side in places:
        left = x + across - {"left": 0.0, "center": width / 2, "right": width}[side]
        box = Box(left, y + up - LINE_PX / 2, left + width, y + up + LINE_PX / 2)
        yield Place(x + across, y + up, side, box)
