"""What vLLM makes of the directory of a Llama: run in an environment that has vLLM, by `test_vllm`.

    python vllm_layers.py DIRECTORY OUT.json

vLLM reads config.json, makes its linear layers for it and puts the stored tensors into their parameters, all by its own
code. Nothing is computed and no GPU is needed: the platform that vLLM finds is told that it is CUDA of a capability of
8.0 (Ampere), so that kernels are chosen for that. `error` is written where vLLM refuses the directory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors.torch import load_file
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

METHODS = ("compressed-tensors", "gptq", "awq", "inc")
UNUSED_BY_VLLM = ("g_idx",)
"""Tensors that vLLM leaves out where columns are in their order."""


class Ampere(type(current_platform)):  # type: ignore[misc]
    """The platform that was found, as if it were CUDA on an A100."""

    _enum = PlatformEnum.CUDA
    device_type = "cuda"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        """8.0"""
        return DeviceCapability(8, 0)


def main(path: Path, out: Path) -> None:
    """Write a JSON object of `version` and either `layers` or `error`."""
    for method in METHODS:
        quantization.get_quantization_config(method)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        rendezvous = Path(tempfile.mkdtemp()) / "rank"
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)
    current_platform.__class__ = Ampere
    found: dict[str, Any] = {"version": vllm.__version__}
    try:
        found["layers"] = dict(_layers(path))
    except (ValueError, NotImplementedError, ImportError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(found))


def _layers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every linear layer by its path, and the head."""
    model = ModelConfig(model=str(path), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True)
    config = VllmConfig(model_config=model)
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config):
        # only its making tells the configuration which matrices it joins
        LlamaForCausalLM.__new__(LlamaForCausalLM, vllm_config=config)
        for layer in range(model.hf_config.num_hidden_layers):
            for prefix, linear, members in _linears(model.hf_config, config.quant_config, f"model.layers.{layer}"):
                yield prefix, {**_described(linear), **_filled(linear, members, tensors)}
        head = ParallelLMHead(512, model.hf_config.hidden_size, quant_config=config.quant_config, prefix="lm_head")
        yield "lm_head", _described(head)


def _linears(hf: Any, quant_config: Any, block: str) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    """The linear layers of a block as vLLM's own Llama makes them, each with the matrices it is made of."""
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    heads, kv_heads, head_dim = hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim
    hidden, inner = hf.hidden_size, hf.intermediate_size
    options: dict[str, Any] = {"bias": False, "quant_config": quant_config}
    prefix = f"{attention}.qkv_proj"
    joined = QKVParallelLinear(hidden, head_dim, heads, kv_heads, prefix=prefix, **options)
    yield prefix, joined, [(f"{attention}.{kind}_proj", kind) for kind in "qkv"]
    prefix = f"{attention}.o_proj"
    yield prefix, RowParallelLinear(heads * head_dim, hidden, prefix=prefix, **options), [(prefix, None)]
    prefix = f"{mlp}.gate_up_proj"
    merged = MergedColumnParallelLinear(hidden, [inner, inner], prefix=prefix, **options)
    yield prefix, merged, [(f"{mlp}.gate_proj", 0), (f"{mlp}.up_proj", 1)]
    prefix = f"{mlp}.down_proj"
    yield prefix, RowParallelLinear(inner, hidden, prefix=prefix, **options), [(prefix, None)]


def _described(layer: Any) -> dict[str, Any]:
    method = layer.quant_method
    scheme = getattr(layer, "scheme", getattr(method, "scheme", None))
    kernel = next(
        (getattr(of, name) for of in (scheme, method) for name in ("kernel", "linear_kernel") if hasattr(of, name)),
        None,
    )
    of_config = getattr(method, "quant_config", None)
    sizes = [getattr(of, "group_size", None) for of in (scheme, of_config)]
    kinds = [str(getattr(of, "quant_type", "")) for of in (scheme, of_config)]
    return {
        "method": type(method).__name__,
        "scheme": "" if scheme is None else type(scheme).__name__,
        "kernel": "" if kernel is None else type(kernel).__name__,
        "type": next(filter(None, kinds), ""),
        "group_size": next((size for size in sizes if size is not None), None),
    }


def _filled(layer: Any, members: list[tuple[str, Any]], tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Put the stored tensors in place. Which have none, and parameters that got nothing or another shape's values."""
    parameters = dict(layer.named_parameters())
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    placeless = []
    for member, shard in members:
        for name in [name for name in tensors if name.rpartition(".")[0] == member]:
            leaf = name.rpartition(".")[2]
            if leaf in parameters:
                parameter = parameters[leaf]
                parameter.weight_loader(parameter, tensors[name], *(() if shard is None else (shard,)))
                parts[leaf].append(tensors[name])
            elif leaf not in UNUSED_BY_VLLM:
                placeless.append(name)
    return {"placeless": placeless, "changed": [name for name in parts if not _holds(parameters[name], parts[name])]}


def _holds(parameter: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether a parameter is its stored tensors in its type, one after the other along rows or columns."""
    if not parts:
        return False
    if parts[0].numel() <= 2:  # the shape of the last matrix, scales of whole matrices
        return True
    along = 1 if sum(part.shape[1] for part in parts) == parameter.shape[1] else 0
    return torch.equal(parameter.float(), torch.cat(parts, along).to(parameter.dtype).float())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
