"""Peak memory of capturing states and gradients: block by block against the whole model in memory.

    python -m benchmarks.memory [--layers 16] [--hidden 1024]

A random Llama is written to a temporary folder; each way runs in a process of its own. Printed is the peak resident
memory above that of the process after its imports, beside the size of the float32 weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SEQUENCES, SEQUENCE_LENGTH = 4, 256


def write_model(path: Path, layers: int, hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def tokens() -> torch.Tensor:
    return torch.randint(0, 8192, (SEQUENCES, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))


def capture_streamed(path: Path) -> None:
    """States and gradients of every layer to tables on disk, one block in memory."""
    from lmq.measurement.replay import (
        backward_block,
        forward_block,
        read_hidden_states,
        write_gradients,
        write_hidden_states,
    )
    from lmq.model.discovery import discover
    from lmq.model.streaming import StreamedModel

    structure = discover(path, weights_sha256="")
    model = StreamedModel.open(path, structure)
    inputs = model.block_inputs(SEQUENCE_LENGTH)
    write_hidden_states(path / "hidden-0", model.embed(tokens()))
    for layer in range(structure.layers):
        with model.block(layer) as block:
            leaving = forward_block(block, inputs[layer], read_hidden_states(path / f"hidden-{layer}"), layer=layer)
        write_hidden_states(path / f"hidden-{layer + 1}", leaving)
    gradient = model.loss_gradient(leaving, tokens()).gradient
    for layer in range(structure.layers - 1, -1, -1):
        write_gradients(path / f"gradient-{layer}", gradient)
        with model.block(layer) as block:
            hidden = read_hidden_states(path / f"hidden-{layer}")
            gradient = backward_block(block, inputs[layer], hidden, gradient, layer=layer)


def capture_whole(path: Path) -> None:
    """The usual way: load the model, one forward and backward with hooks per sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    kept: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_full_backward_hook(lambda _, __, outputs: kept.append(outputs[0].detach()))
        block.register_forward_hook(lambda _, args, __: kept.append(args[0].detach()))
    for sequence in tokens():
        embedded = model.get_input_embeddings()(sequence[None]).requires_grad_(True)
        model(inputs_embeds=embedded, labels=sequence[None]).loss.backward()


def peak_bytes() -> int:
    """Peak resident bytes of this program (Linux); unlike getrusage's, not inherited from the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(way: str, path: Path) -> int:
    """Peak bytes above those of the imports, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--way", way, "--path", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--way", choices=["streamed", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        import transformers  # noqa: F401 - part of the baseline

        import lmq.model.streaming  # noqa: F401

        before = peak_bytes()
        {"streamed": capture_streamed, "whole": capture_whole}[arguments.way](arguments.path)
        print(peak_bytes() - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_model(path, arguments.layers, arguments.hidden)
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        streamed, whole = measure("streamed", path), measure("whole", path)
    print(f"capture of {SEQUENCES} × {SEQUENCE_LENGTH} tokens, {arguments.layers} layers, hidden {arguments.hidden}")
    print(f"{'weights on disk':<24}{weights / 1e6:>10,.0f} MB")
    print(f"{'whole model, hooks':<24}{whole / 1e6:>10,.0f} MB")
    print(f"{'block by block':<24}{streamed / 1e6:>10,.0f} MB   {whole / streamed:.1f}x less")


if __name__ == "__main__":
    main()
