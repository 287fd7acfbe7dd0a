"""How many calibration tokens the router of a layer sends to every expert, and which experts saw too few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from lmq.measurement.base import LayerReplay, Measurement, Need, Row
from lmq.measurement.pooling import FEWEST_TOKENS
from lmq.measurement.replay import forward_block
from lmq.model.experts import RoutedExperts
from lmq.tables import MODULE_FIELDS, TableSchema

EXPERT_TOKENS_SCHEMA = TableSchema(
    "expert-tokens",
    1,
    pa.schema(
        [
            *MODULE_FIELDS,
            pa.field("tokens", pa.int64(), nullable=False),
            pa.field("pooled", pa.bool_(), nullable=False),
        ]
    ),
)
"""`kind` is that of an expert, as `mlp.experts.3`; a `pooled` one took what its layer shares."""


def measure_expert_tokens(layer: LayerReplay) -> Iterator[Row]:
    """Tokens that are routed to every expert of one layer; no rows for a layer without experts."""
    counts: dict[str, int] = {}
    for path, module in layer.block.named_modules():
        if isinstance(module, RoutedExperts):
            for number, expert in module.named_children():
                kind = f"{path}.{number}"
                counts[kind] = 0

                def count(_: Any, args: Any, __: Any, kind: str = kind) -> None:
                    counts[kind] += len(args[0])

                expert.register_forward_hook(count)
    if counts:
        forward_block(layer.block, layer.block_inputs, layer.hidden, layer=layer.layer)
    for kind, tokens in counts.items():
        yield {"layer": layer.layer, "kind": kind, "tokens": tokens, "pooled": tokens < FEWEST_TOKENS}


def pooled_experts(rows: Sequence[Row]) -> list[str]:
    """A sentence that names the experts which took what their layers share; none where all saw enough."""
    few = [row for row in rows if row["pooled"]]
    if not few:
        return []
    named = ", ".join(f"layer {row['layer']} {row['kind']} ({row['tokens']})" for row in few)
    return [
        f"{len(few)} of {len(rows)} experts saw fewer than {FEWEST_TOKENS} calibration tokens and were measured with "
        f"what the experts of their layer share (tokens in brackets); calibrate on more text: {named}"
    ]


EXPERT_TOKENS = Measurement(
    name="expert_tokens",
    title="Tokens of every expert",
    schema=EXPERT_TOKENS_SCHEMA,
    needs=frozenset({Need.STATES}),
    measure=measure_expert_tokens,
)
