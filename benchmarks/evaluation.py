"""Perplexity of a variant as a run measures it, against the plain Hugging Face loop over the same windows.

    python -m benchmarks.evaluation MODEL CHECKPOINT [--windows 6] [--window 1024] [--stride 512] [--threads 1]

MODEL is the directory of the source, CHECKPOINT what lmq made of it. Theirs: the checkpoint is opened and unpacked, and
every window goes through `model(input_ids, labels=...)`, with the labels of context tokens masked. Ours: one block at
a time for all windows, its weights unpacked once, logits of scored tokens alone, and also with the KL divergence to the
full-precision model, whose states are at hand in a run. Times are CPU seconds, loading included; both in one process.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import lmq
from lmq.checkpoint.open import QuantizedBlocks
from lmq.evaluation.perplexity import Window, full_windows
from lmq.evaluation.windows import last_states, score_windows, window_tokens
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.text.calibration import PYDOC_TOPICS, TextSource, documents, load_tokenizer, text_prefix, token_stream


@torch.no_grad()
def plain_loop(checkpoint: Path, windows: list[Window], tokens: Tensor) -> float:
    """Summed negative log-likelihood."""
    model = lmq.load(checkpoint, dtype=torch.float32, dense=True)
    total = 0.0
    for window, seen in zip(windows, tokens.long(), strict=True):
        labels = seen.clone()
        labels[: len(seen) - window.scored] = -100
        total += model(seen[None], labels=labels[None], use_cache=False).loss.item() * window.scored
    return total


def block_by_block(
    source: Path, checkpoint: Path, windows: list[Window], tokens: Tensor, reference: Tensor | None
) -> float:
    """Summed negative log-likelihood, with the divergence to `reference` measured beside."""
    structure = discover(source, weights_sha256="not needed")
    model = StreamedModel.open(source, structure)
    states = last_states(model, tokens, QuantizedBlocks(checkpoint, structure).put_in)
    return sum(row["nll_sum"] for row in score_windows(model, windows, tokens, states, reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    length = options.window + options.stride * (options.windows - 1)
    stream = token_stream(documents(TextSource(source=PYDOC_TOPICS)), tokenizer, length)
    windows = full_windows(length, options.window, options.stride)
    tokens = window_tokens(stream, windows, text_prefix(tokenizer))
    structure = discover(options.model, weights_sha256="not needed")
    reference = last_states(StreamedModel.open(options.model, structure), tokens)
    ways = {
        "plain Hugging Face loop": lambda: plain_loop(options.checkpoint, windows, tokens),
        "lmq": lambda: block_by_block(options.model, options.checkpoint, windows, tokens, None),
        "lmq, with KL": lambda: block_by_block(options.model, options.checkpoint, windows, tokens, reference),
    }
    print(f"{len(windows)} windows of {options.window}, stride {options.stride}, {options.threads} threads")
    scored = sum(window.scored for window in windows)
    usual_s = 0.0
    for name, measure in ways.items():
        started = time.process_time()
        total = measure()
        seconds = time.process_time() - started
        usual_s = usual_s or seconds
        print(f"{name:<24}{seconds:>8.1f} s{usual_s / seconds:>7.2f}x   perplexity {math.exp(total / scored):.6f}")


if __name__ == "__main__":
    main()
