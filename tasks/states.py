"""Stages that capture states: forward through the blocks one by one, and back again with gradients of the loss.

Gradients are those of the text, or of labels that the model draws. For the latter matrix products are taken in bfloat16
where the processor is fast at it: the draws vary far more than its rounding.
"""

from __future__ import annotations

from lmq.measurement.quantizer_moments import backward_with_moments, save_moments
from lmq.measurement.replay import (
    backward_block,
    forward_block,
    read_gradients,
    read_hidden_states,
    write_gradients,
    write_hidden_states,
)
from lmq.measurement.sequence_fisher import sampled_loss_gradient
from lmq.model.experts import every_token
from lmq.numerics import fast_products
from lmq_tasks.inputs import open_model, read_examples, read_pairs
from lmq_tasks.stage import Job, stage

HIDDEN_STATES_FILE = "hidden-states.parquet"
GRADIENTS_FILE = "gradients.parquet"
MOMENTS_FILE = "moments.safetensors"


@stage("embed", version=1, schema="hidden-states/1")
def embed(job: Job) -> None:
    """States that enter the first block for the calibration tokens, images, or images with text."""
    model, packed = open_model(job), read_pairs(job)
    if packed is not None:
        entering = model.embed_pairs(packed.pairs, packed.token_ids.shape[1])
    else:
        entering = model.embed(read_examples(job).inputs, job.config.get("tower", 0))
    write_hidden_states(job.output / HIDDEN_STATES_FILE, entering)


@stage("forward", version=1, schema="hidden-states/1")
def forward(job: Job) -> None:
    """States that leave one block, which enter the next."""
    model = open_model(job)
    layer = job.config["layer"]
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    with model.block(layer, only_run=True) as block:
        leaving = forward_block(block, model.block_inputs(hidden.shape[1])[layer], hidden, layer=layer)
    write_hidden_states(job.output / HIDDEN_STATES_FILE, leaving)


@stage("loss-gradient", version=1, schema="gradients/1")
def loss_gradient(job: Job) -> None:
    """Gradient of the summed calibration loss at the states that leave the last block."""
    given = read_examples(job).given
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    write_gradients(job.output / GRADIENTS_FILE, open_model(job).loss_gradient(hidden, given).gradient)


@stage("backward", version=1, schema="gradients/1")
def backward(job: Job) -> None:
    """Gradient at the states that enter one block, which leave the one before."""
    model = open_model(job)
    layer = job.config["layer"]
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE))
    with model.block(layer, only_run=True) as block:
        inputs = model.block_inputs(hidden.shape[1])[layer]
        entering = backward_block(block, inputs, hidden, gradient, layer=layer)
    write_gradients(job.output / GRADIENTS_FILE, entering)


@stage("sampled-loss-gradient", version=2, schema="gradients/1")
def sampled_gradient(job: Job) -> None:
    """Gradient of the loss for labels drawn by the model at the states that leave the last block, for every draw."""
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    packed = read_pairs(job)
    with fast_products(job.device):
        gradient = sampled_loss_gradient(
            open_model(job),
            hidden,
            draws=job.config["draws"],
            seed=job.config["seed"],
            tower=job.config.get("tower", 0),
            inputs=read_examples(job).inputs if job.has("tokens") else None,
            is_text=None if packed is None else packed.is_text,
        )
    write_gradients(job.output / GRADIENTS_FILE, gradient)


@stage("sampled-backward", version=2, schema="gradients-and-moments/1")
def sampled_backward(job: Job) -> None:
    """Those gradients at the states that enter one block, from the ones at the states that leave it.

    The same replay gives the second moments of its modules' inputs, weighted by the gradients.
    """
    model = open_model(job)
    layer = job.config["layer"]
    hidden = read_hidden_states(job.input("hidden", HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE))
    kinds = [module.id.kind for module in model.structure.in_layer(layer)]
    with model.block(layer, only_run=True) as block, every_token(block, job.config.get("expert_tokens") == "all"):
        inputs = model.block_inputs(hidden.shape[1])[layer]
        entering, moments = backward_with_moments(block, inputs, hidden, gradient, kinds, layer=layer, fast_block=True)
    write_gradients(job.output / GRADIENTS_FILE, entering)
    save_moments(job.output / MOMENTS_FILE, moments)
