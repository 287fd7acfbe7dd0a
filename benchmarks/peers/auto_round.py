"""Intel AutoRound: rounding and clips learned block by block, or schemes chosen per layer (AutoScheme).

Its packing stores a float16 scale and a zero of the code's bits per group, also where the grid is symmetric.
"""

import torch
from auto_round import AutoRound, AutoScheme

from benchmarks.peers.job import Job, Quantized, effective_weights, run


def quantize(job: Job) -> Quantized:
    options = job.options
    tokens = job.token_ids()
    text = torch.utils.data.DataLoader([{"input_ids": ids} for ids in tokens], batch_size=8)
    common = {
        "tokenizer": job.tokenizer(),
        "iters": options["iterations"],
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "dataset": text,
        "device_map": "cpu",
        "enable_torch_compile": False,
        "amp": False,
    }
    grid = {"group_size": options["group_size"], "sym": options["symmetric"]}
    if "average_bits" in options:
        scheme = AutoScheme(avg_bits=options["average_bits"], options=options["schemes"])
        program = AutoRound(job.load(), scheme=scheme, **common)
    else:
        program = AutoRound(job.load(), bits=options["bits"], **grid, **common)
    model, layers = program.quantize()
    stored = weights = 0.0
    for name in job.matrices:
        parameters = model.get_submodule(name).weight.numel()
        bits, group_size = layers[name]["bits"], layers[name]["group_size"]
        stored += parameters * (bits + (16 + bits) / group_size)
        weights += parameters
    return Quantized(effective_weights(model, job.matrices), stored / weights)


if __name__ == "__main__":
    run(quantize)
