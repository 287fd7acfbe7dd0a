"""Peak memory of measuring and quantizing one block of a large mixture of experts, one expert in memory at a time.

    python -m benchmarks.large_experts [--experts 128] [--sequences 4] [--menu b3g64,b4g64] [--whole]

The block has the shape of Qwen3-235B-A22B: 128 experts of 3 × 4,096 × 1,536 weights, 8 for every token, 4.8 GB in
bfloat16, twice that in float32, which it is computed in. Weights, states and gradients are random. The steps are those
of a run: forward, and back with what goes through the experts; then for every expert its second moments, its codes of
every configuration, their sequence-wise Fisher costs, and the tensors of the checkpoint, written to a file. `--experts`
are how many are measured and quantized: what is held of one is let go before the next. `--whole` reads the whole block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from benchmarks.llama_files import byte_tokenizer
from benchmarks.memory import peak_bytes
from lmq.checkpoint.write import quantize_layer, save_layer
from lmq.formats.spec import QuantSpec
from lmq.measurement.expert_traces import ExpertTraces
from lmq.measurement.grids import quantize_modules
from lmq.measurement.quantizer_moments import fisher_moments_of
from lmq.measurement.replay import forward_block
from lmq.measurement.sequence_fisher import sequence_loss_changes
from lmq.model import streaming
from lmq.model.discovery import discover
from lmq.model.stored_matrices import load_layer_weights
from lmq.model.streaming import StreamedModel
from lmq.quantizers import quantizer

T = TypeVar("T")
HIDDEN, INNER, EXPERTS, PER_TOKEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, VOCABULARY = 4096, 1536, 128, 8, 64, 4, 128, 512
SEQUENCE_LENGTH = 256
_EXPERTS_PER_FILE = 8


def main() -> None:
    options = _arguments()
    if options.write is not None:
        write_block(options.write)
    elif options.folder is not None:
        measure(options)
    else:  # in processes of their own: what writing the block takes is not counted
        with tempfile.TemporaryDirectory() as folder:
            this = [sys.executable, "-m", "benchmarks.large_experts"]
            subprocess.run([*this, "--write", folder], check=True)
            subprocess.run([*this, "--folder", folder, *sys.argv[1:]], check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=EXPERTS, help="how many to measure and quantize (default all)")
    parser.add_argument("--sequences", type=int, default=4, help=f"of {SEQUENCE_LENGTH} tokens (default 4)")
    parser.add_argument("--menu", default="b3g64,b4g64", help="configurations (default b3g64,b4g64)")
    parser.add_argument("--quantizer", default="fisher-gptq", help="how codes are found (default fisher-gptq)")
    parser.add_argument("--whole", action="store_true", help="read all experts of the block at once")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_block(path: Path) -> None:
    """The model with one block in bfloat16, each expert's three matrices apart, as it is on the hub."""
    Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()

    block, ones = "model.layers.0", lambda size: torch.ones(size, dtype=torch.bfloat16)
    around = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": ones(HIDDEN),
        f"{block}.input_layernorm.weight": ones(HIDDEN),
        f"{block}.post_attention_layernorm.weight": ones(HIDDEN),
        f"{block}.self_attn.q_norm.weight": ones(HEAD_DIM),
        f"{block}.self_attn.k_norm.weight": ones(HEAD_DIM),
        f"{block}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.k_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.v_proj.weight": matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        f"{block}.mlp.gate.weight": matrix(EXPERTS, HIDDEN),
    }
    places = _save(path, "around", around)
    for first in range(0, EXPERTS, _EXPERTS_PER_FILE):
        tensors: dict[str, Tensor] = {}
        for number in range(first, first + _EXPERTS_PER_FILE):
            expert = f"{block}.mlp.experts.{number}"
            tensors[f"{expert}.gate_proj.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{expert}.up_proj.weight"] = matrix(INNER, HIDDEN)
            tensors[f"{expert}.down_proj.weight"] = matrix(HIDDEN, INNER)
        places |= _save(path, f"experts-{first}", tensors)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _save(path: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one file; the file of every tensor."""
    save_file(tensors, path / f"{name}.safetensors", metadata={"format": "pt"})
    return dict.fromkeys(tensors, f"{name}.safetensors")


def measure(options: argparse.Namespace) -> None:
    """Print the peak after every step."""
    folder: Path = options.folder
    if options.whole:
        streaming._EXPERTS_BYTES = sys.maxsize
    weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(
        f"one block of {EXPERTS} experts, {weight_bytes / 1e9:.1f} GB as stored; "
        f"{options.sequences} sequences of {SEQUENCE_LENGTH} tokens, {torch.get_num_threads()} CPU threads"
    )
    print(f"after the imports {peak_bytes() / 1e9:.2f} GB\n")
    print("| step | seconds | peak GB |\n|---|---:|---:|")
    model = _timed("open", lambda: StreamedModel.open(folder, discover(folder, weights_sha256="")))
    generator = torch.Generator().manual_seed(1)
    size = (options.sequences, SEQUENCE_LENGTH, HIDDEN)
    hidden, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    inputs = model.block_inputs(SEQUENCE_LENGTH)[0]
    with model.block(0, only_run=True) as block:
        _timed("forward", lambda: forward_block(block, inputs, hidden, layer=0))
        traces = _timed("back", lambda: ExpertTraces(block, inputs, hidden, gradient, "mlp.experts"))
        menu = [QuantSpec.parse(name) for name in options.menu.split(",")]
        what = f"{options.experts} experts measured and quantized at {len(menu)} configurations by {options.quantizer}"
        _timed(what, lambda: [_expert(model, traces, number, menu, options) for number in range(options.experts)])


def _expert(
    model: StreamedModel, traces: ExpertTraces, number: int, menu: list[QuantSpec], options: argparse.Namespace
) -> None:
    """Measure one expert, and write its tensors of the last configuration."""
    of_expert = traces.of(number)
    modules = {info.id: info for info in model.structure.in_layer(0) if info.id.kind in of_expert}
    by_kind = load_layer_weights(options.folder, model.structure, 0, of_expert)
    weights = {module: by_kind[module.kind] for module in modules}
    moments = {module: fisher_moments_of(of_expert[module.kind]) for module in modules}
    grids = quantize_modules(weights, menu, quantizer(options.quantizer), moments)
    for module, weight in weights.items():
        errors = {spec: grid.round_trip(weight) - weight for spec, grid in grids[module].items()}
        sequence_loss_changes(of_expert[module.kind], errors, sequence_length=SEQUENCE_LENGTH)
    tensors = quantize_layer(model.structure, weights, grids, dict.fromkeys(weights, menu[-1]))
    save_layer(options.folder / f"expert-{number}.quantized", tensors)


def _timed(step: str, work: Callable[[], T]) -> T:
    """The result of `work`, and a row of the table."""
    started = time.perf_counter()
    result = work()
    print(f"| {step} | {time.perf_counter() - started:.0f} | {peak_bytes() / 1e9:.2f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
