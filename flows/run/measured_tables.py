"""The tables that were measured in a run, joined over the layers and laid beside its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmq_flows.config.names import slug
from lmq_flows.config.sections import MEASUREMENTS
from lmq_flows.graph.build import Measurements
from lmq_flows.graph.node import Node
from lmq_storage import ArtifactRef, ArtifactStore


def write_measured_tables(
    directory: Path, store: ArtifactStore, measured: Mapping[str, Measurements], refs: Mapping[Node, ArtifactRef | None]
) -> None:
    """Write `MODEL-MEASUREMENT.parquet` for every measurement of every model (name → nodes) that has all its layers."""
    directory.mkdir(exist_ok=True)
    for model, measurements in measured.items():
        for name in (field.name for field in fields(measurements) if field.name in (*MEASUREMENTS, "frobenius")):
            made = [refs[node] for node in getattr(measurements, name)]
            layers = [ref for ref in made if ref is not None]
            if layers and len(layers) == len(made):
                _write_joined(directory / f"{slug(model)}-{name.replace('_', '-')}.parquet", store, layers)


def _write_joined(path: Path, store: ArtifactStore, layers: Sequence[ArtifactRef]) -> None:
    """Join the tables of all layers; their schema label stays."""
    (file,) = (name for name in store.files(layers[0]) if name.endswith(".parquet"))
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.concat_tables(pq.read_table(store.path(ref, file)) for ref in layers), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
