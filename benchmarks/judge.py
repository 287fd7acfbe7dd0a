"""How benchmarks judge quantized models on windows of a text: perplexity, divergence from the unquantized model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lmq.allocation.budget import module_sizes
from lmq.allocation.targets import Target
from lmq.measurement.divergence import divergence
from lmq.measurement.grids import Allocation
from lmq.measurement.quantized_model import GridsOfLayer, QuantizedPoint
from lmq.model.streaming import StreamedModel

Scores = tuple[float, float, float]
"""Perplexity, mean KL per token in nats, share of equal most likely tokens."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Compares a quantized model with the unquantized one on windows of tokens [windows, window]."""

    model: StreamedModel
    tokens: Tensor
    reference: Tensor

    @classmethod
    def of(cls, model: StreamedModel, tokens: Tensor) -> Judge:
        """With the states that leave the unquantized model's last block."""
        reference = QuantizedPoint(model, lambda _: {}, matmul_dtype=torch.float32).last_states(tokens)
        return cls(model=model, tokens=tokens, reference=reference)

    @torch.no_grad()
    def scores(self, grids: GridsOfLayer | None, allocation: Allocation | None = None) -> Scores:
        """Of the model under an allocation, or as it is."""
        states = self.reference
        if grids is not None:
            states = QuantizedPoint(self.model, grids, matmul_dtype=torch.float32).last_states(self.tokens, allocation)
        targets = self.tokens[:, 1:].flatten().to(self.model.device)
        loss = apart = alike = 0.0
        step = self.model.tokens_at_once
        pairs = zip(*(part[:, :-1].flatten(0, 1).split(step) for part in (self.reference, states)), strict=True)
        for (expected, found), target in zip(
            ([self.model.head_logits(part).float().log_softmax(-1) for part in pair] for pair in pairs),
            targets.split(step),
            strict=True,
        ):
            loss -= float(found.gather(1, target[:, None]).double().sum())
            apart += float(divergence(expected, found).double().sum())
            alike += float((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens = len(targets)
        return math.exp(loss / tokens), apart / tokens, alike / tokens


def read_tokens(tokenizer: AutoTokenizer, path: Path, rows: int, length: int, bos: int | None) -> Tensor:
    """The first tokens of a text, int64 [rows, length], each row behind BOS where there is one."""
    ids = tokenizer(path.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if bos is None:
        return ids[: rows * length].view(rows, length)
    return torch.cat([torch.full((rows, 1), bos), ids[: rows * (length - 1)].view(rows, -1)], dim=1)


def bits_per_weight(model: StreamedModel, allocation: Allocation, target: Target | None = None) -> float:
    """Stored bits per weight of the block matrices under an allocation, in a target's file or in a checkpoint."""
    modules = model.structure.modules
    size_bytes = sum(int(module_sizes([module], [allocation[module.id]], target)[0, 0]) for module in modules)
    return 8 * size_bytes / sum(module.parameters for module in modules)


def print_header(what: str) -> None:
    """The head of a table whose rows `print_row` prints."""
    print(f"| model | {what} | configuration | bits per weight | perplexity | KL | top-1 |")
    print("|---|---|---|---:|---:|---:|---:|")


def print_row(model: str, name: str, spec: str, bits: float, scores: Scores) -> None:
    """One row, at once."""
    perplexity, apart, alike = scores
    print(f"| {model} | {name} | {spec} | {bits:.4g} | {perplexity:.2f} | {apart:.4f} | {alike:.3f} |", flush=True)
