"""Layers × kinds maps of an allocation: bits per weight, and the difference to a baseline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId, expert_number
from lmq.report.figures.canvas import TEXT_PX, Margins, layer_ticks, new_axes
from lmq.report.figures.palette import INK, MUTED, Colour, change_colour, ramp_colour

WIDTH_PX = 440.0
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 74.0, 6.0, 2.0, 20.0
_ROW_PX, _SMALLEST_ROW_PX, _MOST_LABELS = 17.0, 5.0, 24


def allocation_map(
    allocation: Mapping[ModuleId, QuantSpec],
    *,
    kinds: Sequence[str],
    layers: int,
    scale: Sequence[QuantSpec],
    boosted: Collection[ModuleId] = (),
    label: str,
) -> Figure:
    """Configuration of every module: a row per kind, a column per layer, colour by its place in `scale`.

    `scale` holds the configurations by bits per weight; share it between the maps that a reader compares.
    Modules in `boosted` carry a dot. A module that is not in the allocation stays empty.
    """
    rank = {spec: index for index, spec in enumerate(scale)}

    def colour(module: ModuleId) -> Colour | None:
        spec = allocation.get(module)
        return None if spec is None else ramp_colour(rank[spec], len(scale))

    figure, axes = _map(colour, kinds, layers, label)
    dots = sorted(module for module in boosted if module in allocation)
    axes.plot(
        [module.layer for module in dots],
        [kinds.index(module.kind) for module in dots],
        linestyle="none",
        marker="o",
        markersize=4.4,
        markerfacecolor="#ffffff",
        markeredgecolor="#1b1f24",
        markeredgewidth=0.8,
    )
    return figure


def difference_map(
    differences_bits: Mapping[ModuleId, float], *, kinds: Sequence[str], layers: int, label: str
) -> Figure:
    """Bits per weight more (blue) or fewer (orange) than a baseline, a row per kind, a column per layer."""

    def colour(module: ModuleId) -> Colour | None:
        return change_colour(differences_bits[module]) if module in differences_bits else None

    return _map(colour, kinds, layers, label)[0]


def short_kind(kind: str, kinds: Sequence[str]) -> str:
    """`q_proj` for `self_attn.q_proj`, unless another kind ends in the same name; `3.down_proj` of an expert."""
    last = kind.rpartition(".")[2]
    if expert_number(kind) is not None:
        return f"{expert_number(kind)}.{last}"
    return last if sum(other.rpartition(".")[2] == last for other in kinds) == 1 else kind


def _map(
    colour_of: Callable[[ModuleId], Colour | None], kinds: Sequence[str], layers: int, label: str
) -> tuple[Figure, Axes]:
    row_px = _ROW_PX if len(kinds) <= _MOST_LABELS else _SMALLEST_ROW_PX
    height = _TOP_PX + _BOTTOM_PX + row_px * len(kinds)
    margins = Margins(left=_LEFT_PX, right=_RIGHT_PX, top=_TOP_PX, bottom=_BOTTOM_PX)
    figure, axes = new_axes(WIDTH_PX, height, margins, label)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(len(kinds) - 0.5, -0.5))
    layer_ticks(axes, layers)
    labelled = range(0, len(kinds), -(-len(kinds) // _MOST_LABELS))
    axes.set_yticks(list(labelled), labels=[short_kind(kinds[row], kinds) for row in labelled])
    axes.tick_params(axis="y", labelcolor=INK.light)
    axes.tick_params(axis="x", labelcolor=MUTED.light, labelsize=TEXT_PX - 1)
    half_height = 0.5 - 1.0 / row_px
    rectangles: dict[Colour, list[tuple[float, float, float, float]]] = {}
    for row, kind in enumerate(kinds):
        for colour, first, last in _runs([colour_of(ModuleId(layer, kind)) for layer in range(layers)]):
            box = (first - 0.5, row - half_height, last + 0.5, row + half_height)
            rectangles.setdefault(colour, []).append(box)
    for colour, boxes in sorted(rectangles.items(), key=lambda item: item[0].name):
        path = Path.make_compound_path(*(_rectangle(*box) for box in boxes))
        axes.add_patch(PathPatch(path, facecolor=colour.light, edgecolor="none", linewidth=0))
    return figure, axes


def _runs(colours: Sequence[Colour | None]) -> list[tuple[Colour, int, int]]:
    """Neighbouring layers of one colour as (colour, first, last): far fewer shapes than modules."""
    runs = []
    for colour, group in groupby(range(len(colours)), key=lambda layer: colours[layer]):
        layers = list(group)
        if colour is not None:
            runs.append((colour, layers[0], layers[-1]))
    return runs


def _rectangle(left: float, top: float, right: float, bottom: float) -> Path:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return Path(corners, [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY])
