"""The tables that were measured in a run, joined over the layers and laid beside its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmq.measurement.registry import MEASUREMENTS
from lmq_flows.config.names import slug
from lmq_flows.graph.build import MeasuredModel
from lmq_flows.graph.node import Node
from lmq_storage import ArtifactRef, ArtifactStore


def write_measured_tables(
    directory: Path,
    store: ArtifactStore,
    measured: Mapping[str, MeasuredModel],
    refs: Mapping[Node, ArtifactRef | None],
) -> None:
    """Write `MODEL-MEASUREMENT.parquet` for every measurement of every model (name → nodes) that has all its layers."""
    directory.mkdir(exist_ok=True)
    for model, of_model in measured.items():
        for name, nodes in of_model.tables.items():
            made = [refs[node] for node in nodes]
            layers = [ref for ref in made if ref is not None]
            if layers and len(layers) == len(made):
                measurement = MEASUREMENTS[name]
                path = directory / f"{slug(model)}-{measurement.file}"
                _write_joined(path, measurement.file, store, layers)


def _write_joined(path: Path, file: str, store: ArtifactStore, layers: Sequence[ArtifactRef]) -> None:
    """Join the tables of all layers; their schema label stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.concat_tables(pq.read_table(store.path(ref, file)) for ref in layers), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
