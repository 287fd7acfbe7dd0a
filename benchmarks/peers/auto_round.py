"""Intel AutoRound: rounding and clips learned block by block, or schemes chosen per layer (AutoScheme).

Its packing stores a float16 scale and a zero of the code's bits per group, also where the grid is symmetric.
"""

import json
from pathlib import Path

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme

from benchmarks.peers.job import Job, Quantized, effective_weights, run

_SPARE = 32
"""More tokens of a sample: text may be fewer tokens than it was made of, and AutoRound leaves out short ones."""


def quantize(job: Job) -> Quantized:
    options = job.options
    tokens = job.token_ids()
    common = {
        "tokenizer": job.tokenizer(),
        "iters": options["iterations"],
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "device_map": "cpu",
        "enable_torch_compile": False,
        "amp": False,
    }
    grid = {"group_size": options["group_size"], "sym": options["symmetric"]}
    if "average_bits" in options:
        menu = [QuantizationScheme(bits=bits, act_bits=16, **grid) for bits in options["menu"]]
        scheme = AutoScheme(avg_bits=options["average_bits"], options=menu)
        program = AutoRound(job.load(), scheme=scheme, dataset=str(_text_file(job, tokens)), **common)
    else:
        text = torch.utils.data.DataLoader([{"input_ids": ids} for ids in tokens], batch_size=8)
        program = AutoRound(job.load(), bits=options["bits"], dataset=text, **grid, **common)
    model, layers = program.quantize()
    stored = weights = 0.0
    for name in job.matrices:
        parameters = model.get_submodule(name).weight.numel()
        bits, group_size = layers[name]["bits"], layers[name]["group_size"]
        stored += parameters * (bits + (16 + bits) / group_size)
        weights += parameters
    return Quantized(effective_weights(model, job.matrices), stored / weights)


def _text_file(job: Job, tokens: torch.Tensor) -> Path:
    """The calibration text as AutoScheme takes it, a sample a sequence, each with some tokens to spare."""
    ids, length = tokens.flatten(), tokens.shape[1]
    samples = [job.tokenizer().decode(ids[start : start + length + _SPARE]) for start in range(0, len(ids), length)]
    path = Path(job.out).with_suffix(".text.json")
    path.write_text(json.dumps(samples))
    return path


if __name__ == "__main__":
    run(quantize)
