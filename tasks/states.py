"""Stages that capture states: forward through the blocks one by one, and back again with gradients of the loss.

Gradients are those of the text, or of labels that the model draws. For the latter matrix products are taken in bfloat16
where the processor is fast at it: the draws vary far more than its rounding.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch.nn import functional

from lmq.images.pairs import PackedPairs
from lmq.measurement.quantizer_moments import backward_with_moments, save_moments
from lmq.measurement.replay import (
    StatesByLayer,
    backward_block,
    forward_block,
    read_gradients,
    read_hidden_states,
    write_gradients,
    write_hidden_states,
)
from lmq.measurement.sequence_fisher import sampled_loss_gradient
from lmq.model.beside import gradients_beside, states_beside
from lmq.model.experts import every_token
from lmq.numerics import fast_products, require_finite
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
    hidden = read_hidden_states(job.input("hidden", job.file_of("hidden") or HIDDEN_STATES_FILE))
    gradient = read_gradients(job.input("gradient", job.file_of("gradient") or GRADIENTS_FILE))
    kinds = [module.id.kind for module in model.structure.in_layer(layer)]
    with model.block(layer, only_run=True) as block, every_token(block, job.config.get("expert_tokens") == "all"):
        inputs = model.block_inputs(hidden.shape[1])[layer]
        entering, moments = backward_with_moments(block, inputs, hidden, gradient, kinds, layer=layer, fast_block=True)
    write_gradients(job.output / GRADIENTS_FILE, entering)
    save_moments(job.output / MOMENTS_FILE, moments)


def beside_states_file(layer: int) -> str:
    """File of the stage `beside-states` that holds the states which enter one block."""
    return f"hidden-states-{layer:05d}.parquet"


def beside_gradients_file(layer: int) -> str:
    """File of the stage `beside-gradients` that holds the gradients at the states which leave one block."""
    return f"gradients-{layer:05d}.parquet"


@stage("beside-states", version=1, schema="hidden-states-by-layer/1")
def beside_states(job: Job) -> None:
    """States that enter every block beside the language model, for images with text."""
    model, packed = open_model(job), _pairs(job)
    with TemporaryDirectory(dir=job.output) as folder, model.with_beside():
        states = StatesByLayer(Path(folder))
        for pair in (pair for pairs in packed.pairs for pair in pairs):
            for layer, entering in states_beside(model, pair).items():
                require_finite(entering, f"the states that enter {model.structure.block_path(layer)}")
                states.add(layer, entering[None])
        for layer in states.layers:
            write_hidden_states(job.output / beside_states_file(layer), states.of(layer))


@stage("beside-gradients", version=1, schema="gradients-by-layer/1")
def beside_gradients(job: Job) -> None:
    """Gradients at the states that leave every block beside the language model, for every draw of labels.

    An image is a sequence of its own there. Gradients are scaled so that a mean over the patches of all images is what
    a sum over them is per token of the text.
    """
    model, packed = open_model(job), _pairs(job)
    gradient = read_gradients(job.input("gradient", GRADIENTS_FILE)).unflatten(0, (-1, len(packed.token_ids)))
    with TemporaryDirectory(dir=job.output) as folder, model.with_beside(), fast_products(job.device):
        found = StatesByLayer(Path(folder))
        for sequence, pairs in enumerate(packed.pairs):
            rest = gradient[:, sequence]
            for pair in pairs:
                tokens = pair["input_ids"].shape[1]
                own, rest = rest[:, :tokens], rest[:, tokens:]
                own = functional.pad(own, (0, 0, 0, tokens - own.shape[1]))  # of the last pair, the text is cut
                for layer, leaving in gradients_beside(model, pair, own).items():
                    require_finite(leaving, f"the loss gradient that leaves {model.structure.block_path(layer)}")
                    found.add(layer, leaving)
        for layer in found.layers:
            entering = read_hidden_states(job.input("states", beside_states_file(layer)))
            scale = (entering.shape[:2].numel() / packed.token_ids.numel()) ** 0.5
            write_gradients(job.output / beside_gradients_file(layer), found.of(layer) * scale)


def _pairs(job: Job) -> PackedPairs:
    packed = read_pairs(job)
    assert packed is not None, "this stage was given no images with text"
    return packed
