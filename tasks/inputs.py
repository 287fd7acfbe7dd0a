"""What stages open again and again, kept open per thread: the model skeleton and laid-out directories."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path

from torch import Tensor

from lmq.model.source import ModelSource, locate
from lmq.model.streaming import StreamedModel, load_layer_weights
from lmq.model.structure import ModelStructure
from lmq_storage import ArtifactRef, ArtifactStore, DamagedArtifact
from lmq_tasks.stage import Job, ModelLocation

_thread = threading.local()
_laying_out = threading.Lock()


def read_structure(job: Job) -> ModelStructure:
    """The structure of the job's model."""
    return ModelStructure.from_json(json.loads(job.input("structure", "structure.json").read_text()))


def model_dir(job: Job) -> Path:
    """Directory with the source model's safetensors, configuration and tokenizer, on this machine."""
    assert job.site.model is not None, "this stage was given no model"
    return located_dir(job.store, job.site.model)


def located_dir(store: ArtifactStore, location: ModelLocation) -> Path:
    """Directory of a model on this machine. Raises DamagedArtifact when its conversion is gone from the store."""
    if location.kind == "directory":
        return Path(location.place)
    if location.kind == "hub":
        return _hub_dir(location.place)
    stage, _, key = location.place.partition("/")
    ref = store.find(stage, key)
    if ref is None:
        raise DamagedArtifact(f"the converted model {location.place} is gone; run again to make it anew")
    return _lay_out(store, ref)


@functools.cache
def _hub_dir(place: str) -> Path:
    """Local snapshot of a hub revision; the hub is asked once per process."""
    return locate(ModelSource.parse(place)).path


def materialized(job: Job, name: str) -> Path:
    """A single input laid out as a directory with its file names."""
    return _lay_out(job.store, job.ref(name))


def open_model(job: Job) -> StreamedModel:
    """The job's model, opened once per thread (two threads never share its buffers)."""
    wanted = (job.ref("structure").sha256, job.site.device)
    if getattr(_thread, "wanted", None) != wanted:
        _thread.model = StreamedModel.open(model_dir(job), read_structure(job), device=job.device)
        _thread.wanted = wanted
    return _thread.model


def layer_weights(job: Job, structure: ModelStructure, layer: int) -> dict[str, Tensor]:
    """Weights of one layer's modules, kind -> float32 [out_features, in_features]; the model is not built."""
    return load_layer_weights(model_dir(job), structure, layer)


def _lay_out(store: ArtifactStore, ref: ArtifactRef) -> Path:
    with _laying_out:
        return store.materialize(ref, store.local_dir / "laid-out" / ref.sha256[:32])
