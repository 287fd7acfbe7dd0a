"""Tables of importance: one row per layer, per sub-layer, and per block of neighbouring layers."""

from __future__ import annotations

import pyarrow as pa

from lmq.tables import TableSchema

LAYER_METRICS = (
    "activation_variance",
    "pooled_variance",
    "sparsity",
    "relative_sparsity",
    "avss",
    "avss_pooled",
    "avss_relative",
    "avss_pooled_relative",
    "block_influence",
    "angular_distance",
    "leave_one_out",
    "shapley",
)
"""Metric columns of a layer. `avss` takes the paper's variance, `avss_pooled` the authors' program's; both the
absolute ε unless they say relative. `angular_distance` is over the one layer, `shapley` the sum of its sub-layers."""

LAYER_IMPORTANCE_SCHEMA = TableSchema(
    "layer-importance",
    1,
    pa.schema(
        [pa.field("layer", pa.int32(), nullable=False), *(pa.field(name, pa.float64()) for name in LAYER_METRICS)]
    ),
)

SUBLAYER_IMPORTANCE_SCHEMA = TableSchema(
    "sublayer-importance",
    1,
    pa.schema(
        [
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("sublayer", pa.string(), nullable=False),
            pa.field("shapley", pa.float64()),
            pa.field("shapley_stderr", pa.float64()),
            pa.field("leave_one_out", pa.float64()),
        ]
    ),
)

ANGULAR_DISTANCE_SCHEMA = TableSchema(
    "angular-distance",
    1,
    pa.schema(
        [
            pa.field("first_layer", pa.int32(), nullable=False),
            pa.field("block_layers", pa.int32(), nullable=False),
            pa.field("angular_distance", pa.float64()),
        ]
    ),
)
