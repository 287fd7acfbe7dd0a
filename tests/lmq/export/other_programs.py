"""Exports opened by the programs that own their formats, each in a process of its own: they change transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

_SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from torch import nn

path, out, *tokens = sys.argv[1:]
model = open_model(path).eval()
found = {"logits": model(torch.tensor([[int(token) for token in tokens]])).logits.float().detach()}
for name, layer in model.named_modules():
    if hasattr(layer, "qweight"):
        inputs = getattr(layer, "in_features", None) or layer.infeatures
        with torch.no_grad():
            weight = layer(torch.eye(inputs, dtype=torch.float16)[None])[0].float()
        weight = weight if layer.bias is None else weight - layer.bias.float()
        found[name + "|" + type(layer).__module__] = weight.t().contiguous()
save_file(found, out)
"""

GPTQMODEL = """
import torch
from gptqmodel import BACKEND, GPTQModel

def open_model(path):
    return GPTQModel.load(path, device="cpu", backend=BACKEND.%s, dtype=torch.float16).model
"""

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM

def open_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
"""


def opened_by(
    opener: str, package: str, path: Path, tokens: Tensor, tmp_path: Path
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of `tokens` [1, tokens], and the weight that each quantized layer multiplies with, by its path.

    Skips where the package is not installed.
    """
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install 'lmq[gptq]' or 'lmq[auto-round]'")
    out = tmp_path / "opened.safetensors"
    command = [sys.executable, "-c", opener + _SCRIPT, str(path), str(out), *map(str, tokens[0].tolist())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(out)
    logits = found.pop("logits")
    assert all(name.partition("|")[2].startswith(("gptqmodel", "auto_round")) for name in found)
    return logits, {name.partition("|")[0]: weight for name, weight in found.items()}
