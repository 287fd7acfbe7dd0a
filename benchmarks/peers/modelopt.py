"""NVIDIA Model Optimizer's AWQ-lite at 4 bits: float16 scale per group, and one per input of every matrix."""

import copy

import modelopt.torch.quantization as mtq

from benchmarks.peers.job import Job, Quantized, effective_weights, run


def quantize(job: Job) -> Quantized:
    group_size = job.options["group_size"]
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    _set_group_size(config, group_size)
    tokens = job.token_ids()

    def forward(model):
        for ids in tokens:
            model(ids[None])

    model = mtq.quantize(job.load(), config, forward)
    layers = [model.get_submodule(name) for name in job.matrices]
    inputs = sum(layer.in_features for layer in layers)
    parameters = sum(layer.weight.numel() for layer in layers)
    bits = 4 + 16 / group_size + 16 * inputs / parameters
    return Quantized(effective_weights(model, job.matrices), bits)


def _set_group_size(config, group_size):
    """In every place of a nested configuration that sets one along the inputs."""
    entries = config.values() if isinstance(config, dict) else config
    if isinstance(config, dict) and isinstance(config.get("block_sizes"), dict):
        config["block_sizes"][-1] = group_size
    for entry in entries:
        if isinstance(entry, dict | list):
            _set_group_size(entry, group_size)


if __name__ == "__main__":
    run(quantize)
