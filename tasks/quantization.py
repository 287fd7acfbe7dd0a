"""Stages that make the checkpoint: quantize layer by layer, then join the layers."""

from __future__ import annotations

import shutil

from lmq.checkpoint.write import assemble_checkpoint, quantize_embeddings, quantize_layer, quantized_bytes, save_layer
from lmq.errors import LmqError
from lmq.measurement.grids import load_grids
from lmq.model.structure import EMBEDDINGS
from lmq.quantizers import quantizer
from lmq_tasks.allocate import ALLOCATION_FILE, layer_file, read_configurations
from lmq_tasks.inputs import layer_weights, model_dir, read_structure
from lmq_tasks.measure import GRIDS_FILE
from lmq_tasks.stage import Job, stage


@stage("quantize", version=1, schema="quantized-layer/1")
def quantize(job: Job) -> None:
    """Quantize and pack the modules of one layer at their chosen configurations."""
    structure = read_structure(job)
    layer = job.config["layer"]
    allocation = read_configurations(job.input("allocation", layer_file(layer)))
    grids = load_grids(job.input("grids", job.file_of("grids") or GRIDS_FILE))
    if layer == EMBEDDINGS:
        save_layer(job.output / "layer.safetensors", quantize_embeddings(model_dir(job), structure, grids, allocation))
        return
    by_kind = layer_weights(job, structure, layer)
    weights = {info.id: by_kind[info.id.kind].to(job.device) for info in structure.in_layer(layer)}
    on_device = {
        module: {spec: grid.to(job.device) for spec, grid in by_spec.items() if spec == allocation[module]}
        for module, by_spec in grids.items()
    }
    save_layer(job.output / "layer.safetensors", quantize_layer(structure, weights, on_device, allocation))


@stage("checkpoint", version=4, schema="checkpoint/1")
def checkpoint(job: Job) -> None:
    """Join quantized layers with the unquantized tensors into a checkpoint that `lmq.load` opens."""
    structure = read_structure(job)
    allocation = read_configurations(job.input("allocation", ALLOCATION_FILE))
    left_out = [info.id for info in structure.quantized if info.id not in allocation]
    if left_out:
        raise LmqError(
            f"the plan leaves out {left_out[0]} and {len(left_out) - 1} more of {len(structure.quantized)} modules; "
            "they would stay unquantized, and the checkpoint larger than was promised; allocate again"
        )
    target = job.output / "checkpoint"
    assemble_checkpoint(
        target,
        model_dir(job),
        structure,
        allocation,
        job.inputs("quantized", "layer.safetensors"),
        quantizer=quantizer(**job.config["quantizer"]),
    )
    counted = sum(allocation[info.id].size_bytes(info.parameters, info.in_features) for info in structure.quantized)
    stored = quantized_bytes(target)
    if stored != counted:
        raise LmqError(f"the checkpoint holds {stored:,} bytes of quantized modules where {counted:,} were counted")
    for path in target.iterdir():
        shutil.move(path, job.output / path.name)
    target.rmdir()
