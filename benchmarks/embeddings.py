"""What quantizing the input embedding and the head costs: a checkpoint as it is, and without them quantized.

    python -m benchmarks.embeddings MODEL CHECKPOINT [--text pydoc-topics] [--tokens 4096]

MODEL is the directory of the unquantized model, CHECKPOINT one that lmq made of it with `embeddings: true`. The blocks
are the checkpoint's in every row. Windows of 1,024 tokens, strides of 512, as `lmq evaluate` has them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lmq.checkpoint.open import QuantizedBlocks
from lmq.checkpoint.verify import checkpoint_sizes
from lmq.errors import InputError
from lmq.evaluation.perplexity import full_windows
from lmq.evaluation.windows import last_states, score_windows, summarize, window_tokens
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.text.calibration import TextSource, documents, load_tokenizer, text_prefix, token_stream

WINDOW, STRIDE = 1024, 512


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", default="pydoc-topics")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    structure = discover(arguments.model, weights_sha256="not needed", embeddings=True)
    quantized = QuantizedBlocks(arguments.checkpoint, structure)
    if not quantized.embeddings:
        raise InputError(f"{arguments.checkpoint} holds its embeddings as they are; make it with embeddings: true")
    tokenizer = load_tokenizer(arguments.model)
    source = TextSource(source=arguments.text, part="second", seed=42)
    stream = token_stream(documents(source, tokenizer), tokenizer, arguments.tokens)
    windows = full_windows(len(stream), WINDOW, STRIDE)
    seen = window_tokens(stream, windows, text_prefix(tokenizer))
    full, changed = (StreamedModel.open(arguments.model, structure) for _ in range(2))
    quantized.put_around(changed)
    reference = last_states(full, seen)
    packed_bytes = checkpoint_sizes(arguments.checkpoint).total_bytes
    kept_bytes = packed_bytes + sum(
        2 * module.parameters - quantized.specs[structure.path(module.id)].size_bytes(module.parameters)
        for module in quantized.embeddings
    )
    print("| blocks | embedding and head | whole directory | perplexity | KL |\n|---|---|---:|---:|---:|")
    for blocks, around in ((False, False), (True, False), (True, True), (False, True)):
        model = changed if around else full
        states = last_states(model, seen, quantized.put_in) if blocks else last_states(model, seen)
        found = summarize(score_windows(model, windows, seen, states, reference, reference_model=full))
        size = f"{(packed_bytes if around else kept_bytes) / 1e6:.1f} MB" if blocks else "–"
        words = ["quantized" if part else "full precision" for part in (blocks, around)]
        assert found.kl_divergence is not None
        print(f"| {words[0]} | {words[1]} | {size} | {found.perplexity.value:.2f} | {found.kl_divergence.value:.4f} |")


if __name__ == "__main__":
    main()
