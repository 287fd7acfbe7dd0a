"""Does an export open where it should, and is it the model that was exported?

The export is opened as its users open it (transformers; hqq's loader for hqq) and compared with the checkpoint on a few
prompts and on what the checkpoint continues them with. Both compute in float32 on the CPU, so that what differs is what
was written and not how a kernel rounds.

How far it may be off follows from what the exporter says it changed: the checkpoint is disturbed by random noise of the
same relative error in every matrix, and the export may not diverge much more than that (`Tolerance`). A matrix in the
wrong place or order diverges orders of magnitude more.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import lmq
from lmq.errors import InputError
from lmq.export import write_export
from lmq.export.openers import open_export, open_tokenizer
from lmq.export.report import ExportReport, ModuleStep
from lmq.export.source import QuantizedCheckpoint
from lmq.measurement.divergence import divergence
from lmq.model.discovery import embedding_shape
from lmq.text.calibration import load_tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
)
NEW_TOKENS = 24
_IDS_PER_PROMPT = 8


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What an export may differ by; the defaults are those of every format.

    - KL divergence: `noise_factor` times that of noise of the same step errors, plus `kl_floor` nats for what is
      rounded outside the quantized matrices. KL grows with the square of the error: 4 allows for twice the error.
      On SmolLM2-135M and Gemma-3-270m every format caused 0.5 to 1.2 times what the noise did, for relative errors
      from 5e-4 (float16 scales) to 0.07 (whole zeros of compressed-tensors).
    - KL divergence, however well explained: `kl_most` nats, about what quantization to 4 bits costs SmolLM2.
    - Top-1 disagreement: `noise_factor` times that of the noise, plus `ties` tokens.
    - Where no step changed a weight, every generated token must be the same.
    - The tokenizer, where the checkpoint has one: the same tokens for every prompt.
    """

    noise_factor: float = 4.0
    kl_floor: float = 1e-4
    kl_most: float = 0.2
    ties: int = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a model is from the checkpoint, over all predictions of prompts and their greedy continuations.

    `logit_difference` is relative, in the Frobenius norm, after taking from the logits of each token their mean (no
    probability depends on it). `kl_divergence` is the mean KL(checkpoint ‖ model) in nats, `top1_agreement` the share
    of tokens with the same most likely successor.
    """

    tokens: int
    logit_difference: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """What was measured: the export's difference, that of noise of the same step errors, and what is too much.

    `greedy_agreement` is the share of the greedily generated tokens before the first one that differs.
    """

    difference: Difference
    noise: Difference
    greedy_agreement: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the export is within the tolerance."""
        return not self.failures


def export_checked(
    checkpoint: QuantizedCheckpoint,
    target: Path,
    format_name: str,
    options: Mapping[str, str],
    *,
    tolerance: Tolerance | None = None,
) -> tuple[ExportReport, ExportCheck]:
    """Export with the format's `options` and check; the export gets its name only when it has passed.

    Until then, and for good when the check fails, it is `.unchecked-NAME` beside `target`: see `report.path`. Raises
    InputError where either name is taken, and what the exporter and `check_export` raise.
    """
    if target.exists():
        raise InputError(f"{target} exists already; remove it or choose another place")
    unchecked = target.with_name(f".unchecked-{target.name}")
    report = write_export(checkpoint, unchecked, format_name, options)
    check = check_export(checkpoint, report, format_name, tolerance)
    if check.passed:
        report = replace(report, path=unchecked.rename(target))
    return report, check


def check_export(
    checkpoint: QuantizedCheckpoint, report: ExportReport, format_name: str, tolerance: Tolerance | None = None
) -> ExportCheck:
    """Open an export, let it predict and generate, and compare it with its checkpoint; one model is open at a time.

    Raises LmqError where the export does not open, InputError where the package that opens it is missing.
    """
    tokenizer = _tokenizer(checkpoint.path)
    source = lmq.load(checkpoint.path, dtype=torch.float32, dense=True)
    prompts = _encoded(tokenizer) if tokenizer is not None else _random_prompts(source)
    continued = [_continue(source, prompt) for prompt in prompts]
    expected = [_logits(source, tokens) for tokens in continued]
    _disturb(source, report.steps)
    noise = _difference(source, continued, expected)
    del source
    gc.collect()
    exported = open_export(report, format_name)
    difference = _difference(exported, continued, expected)
    greedy = [
        _same_tokens(tokens, _continue(exported, prompt)) for prompt, tokens in zip(prompts, continued, strict=True)
    ]
    greedy_agreement = sum(greedy) / (len(prompts) * NEW_TOKENS)
    failures = _failures(difference, noise, tolerance or Tolerance())
    is_lossless = all(step.relative_error == 0 for step in report.steps.values())
    if is_lossless and greedy_agreement < 1:
        failures.append(f"no weight was changed, yet only {greedy_agreement:.0%} of the generated tokens are the same")
    if tokenizer is not None and not _same_prompts(prompts, _encoded(open_tokenizer(report, format_name))):
        failures.append("the export's tokenizer does not give the tokens of the checkpoint's for the prompts")
    return ExportCheck(difference=difference, noise=noise, greedy_agreement=greedy_agreement, failures=tuple(failures))


def _failures(found: Difference, noise: Difference, tolerance: Tolerance) -> list[str]:
    kl_limit = tolerance.kl_floor + tolerance.noise_factor * noise.kl_divergence
    disagreement, noise_disagreement = (1 - measured.top1_agreement for measured in (found, noise))
    disagreement_limit = tolerance.noise_factor * noise_disagreement + tolerance.ties / found.tokens
    failures = []
    if not found.kl_divergence <= kl_limit:  # NaN fails as well
        failures.append(
            f"KL divergence {found.kl_divergence:.2e} nats, above {kl_limit:.2e}; "
            f"noise of the same step errors causes {noise.kl_divergence:.2e}: what was written is not what was meant"
        )
    elif found.kl_divergence > tolerance.kl_most:
        failures.append(
            f"KL divergence {found.kl_divergence:.2e} nats, above {tolerance.kl_most:g}: "
            "the format does not hold this checkpoint closely enough"
        )
    if not disagreement <= disagreement_limit:
        failures.append(
            f"{disagreement:.1%} of the predictions differ, above {disagreement_limit:.1%}; "
            f"noise of the same step errors causes {noise_disagreement:.1%}"
        )
    return failures


@torch.no_grad()
def _difference(model: PreTrainedModel, sequences: list[Tensor], expected: list[Tensor]) -> Difference:
    kl, agrees, error, size = [], [], 0.0, 0.0
    for tokens, reference in zip(sequences, expected, strict=True):
        logits = _logits(model, tokens)
        kl.append(divergence(reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)))
        agrees.append((logits.argmax(dim=-1) == reference.argmax(dim=-1)).double())
        error += float((_centred(logits) - _centred(reference)).square().sum())
        size += float(_centred(reference).square().sum())
    return Difference(
        tokens=sum(map(len, expected)),
        logit_difference=(error / size) ** 0.5,
        kl_divergence=float(torch.cat(kl).mean()),
        top1_agreement=float(torch.cat(agrees).mean()),
    )


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


@torch.no_grad()
def _disturb(model: PreTrainedModel, steps: Mapping[str, ModuleStep]) -> None:
    """Add noise to the weights of a model that is ours alone: of each step's relative error, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for path, step in steps.items():
        weight = model.get_submodule(path).get_parameter("weight")
        noise = torch.randn(weight.shape, generator=generator)
        weight.add_(noise, alpha=step.relative_error * float(weight.norm() / noise.norm()))


@torch.no_grad()
def _continue(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The prompt int64 [1, tokens] and its `NEW_TOKENS` most likely successors."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0)
    generating: Any = model
    return generating.generate(prompt, generation_config=settings, attention_mask=torch.ones_like(prompt))


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits[0].float()


def _same_tokens(expected: Tensor, generated: Tensor) -> int:
    """Generated tokens before the first that differs."""
    same = expected[0, -NEW_TOKENS:] == generated[0, -NEW_TOKENS:]
    return int(same.int().cumprod(dim=0).sum())


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None where it has none."""
    try:
        return load_tokenizer(directory)
    except InputError:
        return None


def _encoded(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """`PROMPTS` in the words of a tokenizer, int64 [1, tokens] each."""
    return [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]


def _random_prompts(model: PreTrainedModel) -> list[Tensor]:
    """Prompts of random tokens, int64 [1, tokens] each, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_shape(model)[0]
    return list(torch.randint(vocabulary, (len(PROMPTS), 1, _IDS_PER_PROMPT), generator=generator))


def _same_prompts(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
