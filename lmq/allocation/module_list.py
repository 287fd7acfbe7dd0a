"""Lists of modules in words: hundreds of dotted paths as a line that names each of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_IN_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(.+)")


def list_modules(paths: Sequence[str]) -> str:
    """`3 modules (layers 0-1: mlp.up_proj; layer 4: self_attn.q_proj)`; paths outside of layers as they are."""
    layers_of: dict[str, list[int]] = defaultdict(list)
    outside = []
    for path in paths:
        if match := _IN_LAYER.fullmatch(path):
            layers_of[match[2]].append(int(match[1]))
        else:
            outside.append(path)
    kinds_of: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for kind, layers in layers_of.items():
        kinds_of[tuple(sorted(layers))].append(kind)
    words = [f"{_layers(layers)}: {', '.join(sorted(kinds))}" for layers, kinds in sorted(kinds_of.items())]
    return f"{len(paths)} module{'s' * (len(paths) != 1)} ({'; '.join(words + outside)})"


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) != 1)} {', '.join(_ranges(layers))}"


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Ascending numbers as `0-2`, `5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in spans]
