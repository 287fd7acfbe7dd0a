"""How important the layers are, by what their activations say: a band per metric, and every layer's rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lmq.layers.importance.layers import layer_scores
from lmq.report.data import ModelReport
from lmq.report.figures.importance import importance_bands
from lmq.report.figures.svg import figure_svg
from lmq.report.html import Cell, Column, csv_link, figure, not_measured, number, significant, slug, table

TITLE = "Importance of the layers"
_METRICS = {"block_influence": "Block Influence", "avss": "AVSS", "avss_pooled": "AVSS, pooled variance"}
_MOST_NAMED = 5


def importance_part(model: ModelReport) -> str:
    """Block Influence and AVSS of every layer, with their rankings; what removing layers costs is `lmq importance`."""
    if not model.layer_activity:
        return f"<h4>{TITLE}</h4>{not_measured(TITLE)}"
    scores = _scores(model)
    shown = {title: scores[name] for name, title in _METRICS.items()}
    ranks = {title: ranking(values) for title, values in shown.items()}
    bands = figure(figure_svg(importance_figure(model)), css_class="bands")
    names = [name for metric in scores for name in (metric, f"{metric}_rank")]
    columns = [column for values in scores.values() for column in (values, ranking(values))]
    rows = ((layer, *(column[layer] for column in columns)) for layer in range(model.structure.layers))
    link = csv_link(f"layer-importance-{slug(model.name)}.csv", ["layer", *names], rows)
    leaders = "".join(
        f"<li>{title}: {', '.join(str(ranks[title].index(rank)) for rank in range(1, _most(values) + 1))}</li>"
        for title, values in shown.items()
    )
    return (
        f'<h4>{TITLE}</h4><p class="note">Higher is more important. Block Influence: how much a layer turns the states '
        f"that pass it; AVSS: variance over sparsity of what leaves it. {link}</p>"
        f"<p>Most important layers, in order:</p><ul>{leaders}</ul>"
        f'<div class="beside">{bands}{_rank_table(shown, ranks)}</div>'
    )


def importance_figure(model: ModelReport) -> Figure:
    """The metrics of the layers under one another."""
    scores = _scores(model)
    return importance_bands({title: scores[name] for name, title in _METRICS.items()}, title="")


def _scores(model: ModelReport) -> dict[str, list[float]]:
    return layer_scores(sorted(model.layer_activity, key=lambda row: row["layer"]))


def ranking(values: Sequence[float]) -> list[int]:
    """Place of every value, 1 for the largest; of equals the first comes first."""
    places = np.empty(len(values), dtype=int)
    places[np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")] = np.arange(1, len(values) + 1)
    return [int(place) for place in places]


def _most(values: Sequence[float]) -> int:
    return min(_MOST_NAMED, len(values))


def _rank_table(shown: dict[str, list[float]], ranks: dict[str, list[int]]) -> str:
    columns = [Column("Layer", True)]
    columns += [Column(name, True) for title in shown for name in (title, "Rank")]
    rows = []
    for layer in range(len(next(iter(shown.values())))):
        cells = [Cell(str(layer), layer)]
        for title, values in shown.items():
            place = ranks[title][layer]
            cells += [number(significant(values[layer]), values[layer]), number(str(place), place)]
        rows.append(cells)
    return table(columns, rows, "Layers and their ranks")
