"""What stages open again and again, kept open per thread: the model skeleton and laid-out directories."""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmq.errors import InputError
from lmq.images.pairs import PackedPairs, read_packed
from lmq.images.prepared import SCHEMA as IMAGES_SCHEMA
from lmq.images.prepared import read_prepared
from lmq.model.source import ModelSource, locate
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.model.structure import ModelStructure
from lmq.text.calibration import read_tokens
from lmq_storage import ArtifactStore, DamagedArtifact
from lmq_tasks.stage import Job, ModelLocation

TOKENS_FILE = "tokens.parquet"
IMAGES_FILE = "images.safetensors"
PAIRS_FILE = "pairs.safetensors"

_thread = threading.local()


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
    return store.directory(ref)


@functools.cache
def _hub_dir(place: str) -> Path:
    """Local snapshot of a hub revision; the hub is asked once per process."""
    return locate(ModelSource.parse(place)).path


def materialized(job: Job, name: str) -> Path:
    """A single input laid out as a directory with its file names."""
    return job.store.directory(job.ref(name))


def open_model(job: Job) -> StreamedModel:
    """The job's model, opened once per thread (two threads never share its buffers)."""
    wanted = (job.ref("structure").sha256, job.site.device)
    if getattr(_thread, "wanted", None) != wanted:
        _thread.model = StreamedModel.open(model_dir(job), read_structure(job), device=job.device)
        _thread.wanted = wanted
    return _thread.model


@dataclass(frozen=True, eq=False)
class Examples:
    """What a model is given: token ids [sequences, sequence_length], or images [images, channels, height, width] with
    the labels [images] of those that have some."""

    inputs: Tensor
    labels: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """What the loss takes its targets from. Raises InputError for images without labels."""
        if self.labels is not None:
            return self.labels
        if self.inputs.is_floating_point():
            raise InputError("the images have no labels, which the gradient of their loss needs; give some that do")
        return self.inputs


def read_examples(job: Job, name: str = "tokens") -> Examples:
    """An input of tokens or of images, by what the artifact holds."""
    if job.ref(name).schema == IMAGES_SCHEMA:
        prepared = read_prepared(job.input(name, IMAGES_FILE))
        return Examples(prepared.pixels, prepared.labels)
    return Examples(read_tokens(job.input(name, TOKENS_FILE)))


def read_pairs(job: Job) -> PackedPairs | None:
    """Images with text that the model is measured on; None where it is measured on something else."""
    return read_packed(job.input("pairs", PAIRS_FILE)) if job.has("pairs") else None


def layer_weights(job: Job, structure: ModelStructure, layer: int) -> dict[str, Tensor]:
    """Weights of one layer's modules, kind -> float32 [out_features, in_features]; the model is not built."""
    return load_layer_weights(model_dir(job), structure, layer)
