"""GPTQModel's GPTQ, symmetric groups in the order of the columns, which is its default.

Its packing stores a float16 scale and a zero of the code's bits per group, and an int32 per column.
"""

import os
import tempfile

import torch

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer, as on two processors, it refuses

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from benchmarks.peers.job import Job, Quantized, run

_COLUMN_BITS = 32


def quantize(job: Job) -> Quantized:
    bits, group_size = job.options["bits"], job.options["group_size"]
    tokens = job.token_ids()
    text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=False)
    program = GPTQModel.load(job.model, config, device="cpu", dtype=torch.float32)
    program.quantize(text, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    with tempfile.TemporaryDirectory() as folder:
        program.save(folder)
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    weights, columns = {}, 0
    for name in job.matrices:
        layer = model.get_submodule(name)
        unit = torch.eye(layer.in_features, dtype=torch.float16)
        weights[name] = layer(unit[None])[0].float().t()
        columns += layer.in_features
    parameters = sum(weight.numel() for weight in weights.values())
    stored = bits + (16 + bits) / group_size + _COLUMN_BITS * columns / parameters
    return Quantized({name: weight.detach() for name, weight in weights.items()}, stored)


if __name__ == "__main__":
    run(quantize)
