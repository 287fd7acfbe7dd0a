"""HQQ as its own package has it: `BaseQuantizeConfig(nbits, group_size)`, which rounds zeros at 4 bits.

Scale and zero take 16 bits each; 3-bit codes are packed ten to 32 bits.
"""

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer

from benchmarks.peers.job import Job, Quantized, run

PACKED_BITS = {3: 3.2}


def quantize(job: Job) -> Quantized:
    bits, group_size = job.options["bits"], job.options["group_size"]
    options = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)["weight_quant_params"]
    model = job.load()
    weights = {}
    for name in job.matrices:
        weight = model.get_submodule(name).weight.data
        codes, meta = Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, **options)
        meta = {**meta, "scale": meta["scale"].half().float(), "zero": meta["zero"].half().float()}
        weights[name] = Quantizer.dequantize(codes, meta)
    return Quantized(weights, PACKED_BITS.get(bits, bits) + 32 / group_size)


if __name__ == "__main__":
    run(quantize)
