"""mlx-lm's `convert -q`: the nearest codes on affine grids, float16 scale and bias per group. Sees no text."""

import mlx.core as mx
import numpy as np
import torch

from benchmarks.peers.job import Job, Quantized, run


def quantize(job: Job) -> Quantized:
    bits, group_size = job.options["bits"], job.options["group_size"]
    model = job.load()
    weights = {}
    for name in job.matrices:
        weight = mx.array(model.get_submodule(name).weight.data.numpy()).astype(mx.float16)
        parts = mx.quantize(weight, group_size=group_size, bits=bits)
        restored = mx.dequantize(*parts, group_size=group_size, bits=bits).astype(mx.float32)
        weights[name] = torch.from_numpy(np.array(restored))
    return Quantized(weights, bits + 32 / group_size)


if __name__ == "__main__":
    run(quantize)
