"""Stages that say how much a model needs its layers: by removing them, and from what was measured of them."""

from __future__ import annotations

import json
from dataclasses import asdict

from safetensors.torch import load_file

from lmq.layers.importance.cosine import angular_distances
from lmq.layers.importance.estimates import ShapleyOptions, removal_importance
from lmq.layers.importance.layers import layer_importance_rows
from lmq.layers.importance.removal import RemovalValue
from lmq.layers.importance.tables import ANGULAR_DISTANCE_SCHEMA, LAYER_IMPORTANCE_SCHEMA, SUBLAYER_IMPORTANCE_SCHEMA
from lmq.measurement.layer_activity import LAYER_ACTIVITY
from lmq.numerics import fast_matmul_dtype
from lmq.tables import read_rows, write_rows
from lmq.text.calibration import read_tokens
from lmq_tasks.inputs import TOKENS_FILE, open_model
from lmq_tasks.measure import TENSORS_FILE, measured_rows
from lmq_tasks.stage import Job, stage

LAYERS_FILE = "importance.parquet"
SUBLAYERS_FILE = "sublayers.parquet"
ANGULAR_FILE = "angular.parquet"
REMOVAL_FILE = "removal.json"


@stage("removal-importance", version=1, schema=SUBLAYER_IMPORTANCE_SCHEMA.label)
def measure_removal_importance(job: Job) -> None:
    """Shapley values and leave-one-out losses of sub-layers and layers.

    removal.json: the full model's loss, the type that matrices were multiplied in, and the work done.
    """
    tokens = read_tokens(job.input("tokens", TOKENS_FILE))
    dtype = fast_matmul_dtype(job.device)
    value = RemovalValue(open_model(job), tokens, matmul_dtype=dtype)
    importance = removal_importance(value, ShapleyOptions(**job.config))
    write_rows(job.output / SUBLAYERS_FILE, SUBLAYER_IMPORTANCE_SCHEMA, importance.sublayers)
    write_rows(job.output / LAYERS_FILE, LAYER_IMPORTANCE_SCHEMA, importance.layers)
    summary = {
        "loss": value.loss,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "evaluations_unshared": importance.evaluations_unshared,
        **asdict(value.work),
    }
    (job.output / REMOVAL_FILE).write_text(json.dumps(summary))


@stage("layer-importance", version=1, schema=LAYER_IMPORTANCE_SCHEMA.label)
def join_layer_importance(job: Job) -> None:
    """Every metric of every layer, and the angular distance over each block of `angular_layers` neighbours."""
    activities = measured_rows(job, LAYER_ACTIVITY.name)
    states = [load_file(path) for path in job.inputs(LAYER_ACTIVITY.name, TENSORS_FILE)]
    last_tokens = [*(state["entering"] for state in states), states[-1]["leaving"]]
    removal = None
    if job.has("removal"):
        removal = read_rows(job.input("removal", LAYERS_FILE), LAYER_IMPORTANCE_SCHEMA)
    rows = layer_importance_rows(activities, last_tokens, removal)
    write_rows(job.output / LAYERS_FILE, LAYER_IMPORTANCE_SCHEMA, rows)
    block_layers = job.config["angular_layers"]
    distances = [
        {"first_layer": first, "block_layers": block_layers, "angular_distance": distance}
        for first, distance in enumerate(angular_distances(last_tokens, block_layers=block_layers))
    ]
    write_rows(job.output / ANGULAR_FILE, ANGULAR_DISTANCE_SCHEMA, distances)
