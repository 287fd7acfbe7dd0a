"""The difference between any two variants of a model, chosen by the reader and drawn in the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModelStructure, ModuleId
from lmq.report.figures.allocation_map import short_kind
from lmq.report.figures.palette import CHANGE_EDGES

_FIRST_CODE = "A"
_NO_MODULE = "@"
"""One before the first code: a module that the allocation does not have."""

Allocation = Mapping[ModuleId, QuantSpec]


def difference_chooser(
    structure: ModelStructure, allocations: Mapping[str, Allocation], scale: Sequence[QuantSpec]
) -> str:
    """Two choices of a variant and the map of their difference, hidden until the page's script draws it.

    A configuration is one character per module, so that 60 variants take a few kilobytes. `scale` holds every
    configuration. Nothing for fewer than two variants.
    """
    if len(allocations) < 2:
        return ""
    kinds = structure.kinds
    data = {
        "kinds": list(kinds),
        "names": [short_kind(kind, kinds) for kind in kinds],
        "layers": structure.layers,
        "specs": [[spec.name, spec.bits_per_weight] for spec in scale],
        "edges": list(CHANGE_EDGES),
        "variants": [
            {"label": label, "codes": [_codes(allocation, kind, structure.layers, scale) for kind in kinds]}
            for label, allocation in allocations.items()
        ],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    labels = list(allocations)
    mixed = next((i for i, one in enumerate(allocations.values()) if len(set(one.values())) > 1), len(labels) - 1)
    return (
        '<div class="chooser" hidden><h4>Any two variants</h4><div class="choices">'
        f"<label>Bits per weight of {_select(labels, mixed)}</label>"
        f"<label>compared with {_select(labels, 0 if mixed else 1)}</label></div>"
        f'<div class="chosen"></div><p class="note said" aria-live="polite"></p>'
        f'<script type="application/json">{text}</script></div>'
    )


def _codes(allocation: Allocation, kind: str, layers: int, scale: Sequence[QuantSpec]) -> str:
    rank = {spec: chr(ord(_FIRST_CODE) + index) for index, spec in enumerate(scale)}
    specs = (allocation.get(ModuleId(layer, kind)) for layer in range(layers))
    return "".join(_NO_MODULE if spec is None else rank[spec] for spec in specs)


def _select(labels: Sequence[str], chosen: int) -> str:
    options = "".join(
        f'<option value="{index}"{" selected" if index == chosen else ""}>{escape(label)}</option>'
        for index, label in enumerate(labels)
    )
    return f"<select>{options}</select>"
