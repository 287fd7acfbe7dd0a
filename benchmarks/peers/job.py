"""What the module of a peer gets and gives: a model, token ids, options; the weights its checkpoint stands for.

    python -m benchmarks.peers.NAME JOB.json

A module calls `run` with a function from a `Job` to the quantized model. What a linear layer computes is taken from its
outputs for unit vectors, so that scales on its inputs are part of its weight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_BITS_KEY = "bits_per_weight"


@dataclass(frozen=True, kw_only=True)
class Job:
    """`model` is a directory that transformers opens, `tokens` a safetensors file of int64 [sequences, length].

    `matrices` are the paths of the linear layers to quantize. `out` is the safetensors file to write.
    """

    model: str
    tokens: str
    matrices: list[str]
    out: str
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """For `run`."""
        path.write_text(json.dumps(asdict(self)))

    def token_ids(self) -> Tensor:
        """Token ids of the calibration text, int64 [sequences, length]."""
        with safe_open(self.tokens, "pt") as file:
            return file.get_tensor("tokens")

    def load(self) -> nn.Module:
        """The model in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class Quantized:
    """Weights float32 [out_features, in_features] by path, and what their checkpoint takes per weight."""

    weights: Mapping[str, Tensor]
    bits_per_weight: float


def run(quantize: Callable[[Job], Quantized]) -> None:
    """Do the job that the command line names."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    quantized = quantize(job)
    missing = sorted(set(job.matrices) - set(quantized.weights))
    if missing:
        raise SystemExit(f"{len(missing)} matrices were not quantized, the first is {missing[0]}")
    weights = {name: quantized.weights[name].float().contiguous() for name in job.matrices}
    save_file(weights, job.out, metadata={_BITS_KEY: repr(quantized.bits_per_weight)})


def read(path: Path) -> Quantized:
    """What `run` wrote."""
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Quantized(weights, float(file.metadata()[_BITS_KEY]))


@torch.no_grad()
def effective_weights(model: nn.Module, matrices: list[str]) -> dict[str, Tensor]:
    """The matrix that each layer multiplies with, its bias left out, float32 [out_features, in_features]."""
    found = {}
    for name in matrices:
        layer = model.get_submodule(name)
        parameter = next(layer.parameters())
        unit = torch.eye(layer.in_features, dtype=parameter.dtype, device=parameter.device)
        outputs = layer(unit).float()
        if getattr(layer, "bias", None) is not None:
            outputs = outputs - layer.bias.float()
        found[name] = outputs.t().cpu()
    return found
