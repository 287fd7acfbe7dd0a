"""`lmq evaluate`: a checkpoint or plain model judged by itself, without a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmq.errors import LmqError
from lmq.evaluation.options import EvaluationOptions
from lmq.evaluation.task_scores import TaskScore
from lmq_flows.cli.arguments import add_column, add_list, add_number, add_store, at_least
from lmq_flows.cli.terminal import say

if TYPE_CHECKING:
    from lmq.evaluation.windows import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq evaluate`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="directory of a checkpoint (of lmq or any other that transformers opens) or model, hub id, or .gguf file",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the unquantized model, to measure KL divergence and agreement against",
    )
    add_judging(parser)
    add_store(parser, "where a converted model is kept")
    parser.set_defaults(command=evaluate_command)


def add_judging(parser: argparse.ArgumentParser) -> None:
    """On what text and tasks models are judged, and whether memory and speed are measured."""
    default = EvaluationOptions()
    parser.add_argument(
        "--text",
        default=default.source,
        help="file, wikitext2, c4, ptb, or dataset:NAME to measure perplexity on (default: %(default)s)",
    )
    add_column(parser, default.column)
    add_number(parser, "--tokens", default.tokens, "tokens of the text to use")
    add_number(parser, "--window", default.window, "tokens that the model sees at once")
    add_number(parser, "--stride", default.stride, "tokens scored in each window")
    add_list(parser, "--tasks", [], "zero-shot tasks of lm-eval, by name or as local .yaml files")
    parser.add_argument("--limit", type=at_least(1), help="questions per task (default: all)")
    parser.add_argument("--performance", action="store_true", help="also measure memory and speed on this machine")
    add_number(parser, "--threads", 1, "threads to measure speed with")


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Print perplexity, divergence from a reference, zero-shot scores, memory and speed, as far as they are wanted."""
    from lmq.evaluation.whole_model import evaluate_checkpoint
    from lmq_flows.run.prepare import check_window

    checkpoint = model_directory(arguments.checkpoint, arguments.store)
    reference = None if arguments.reference is None else model_directory(arguments.reference, arguments.store)
    if (checkpoint / "config.json").is_file():
        check_window(checkpoint, arguments.window, "--window")
    evaluation = evaluate_checkpoint(
        checkpoint,
        text=arguments.text,
        column=arguments.column,
        tokens=arguments.tokens,
        window=arguments.window,
        stride=arguments.stride,
        reference=reference,
    )
    _print_evaluation(evaluation)
    scores = task_scores(checkpoint, arguments.tasks, arguments.limit)
    for score in scores:
        say(f"{score.task} {format_score(score)}")
    if arguments.performance:
        _print_performance(checkpoint, arguments.threads)
    return 1 if any(score.error for score in scores) else 0


def model_directory(name: str, store: str) -> Path:
    """A directory of safetensors: as given, downloaded, or converted. Raises InputError naming what is not there."""
    from lmq.model.source import ModelSource, locate, needs_conversion
    from lmq_flows.run.plan import inspect_model

    if Path(name).is_dir():
        return Path(name)
    located = locate(ModelSource.parse(name))
    return inspect_model(name, store).model_dir if needs_conversion(located) else located.path


def _print_evaluation(found: Evaluation) -> None:
    from lmq.report.results import format_percent

    stderr = f" ± {found.perplexity.stderr:.4f}" if found.perplexity.stderr is not None else ""
    say(f"perplexity {found.perplexity.value:.4f}{stderr} ({found.protocol}, {found.scored_tokens:,} tokens scored)")
    if found.broken_window is not None:
        window = found.broken_window
        say(f"no probability is left for a token, first in the window of tokens {window.start} to {window.end}")
    if found.kl_divergence is not None:
        kl_stderr = f" ± {found.kl_divergence.stderr:.4f}" if found.kl_divergence.stderr is not None else ""
        say(
            f"KL to the reference {found.kl_divergence.value:z.4f}{kl_stderr} nats, "
            f"99th percentile {found.kl_p99:.4f}, top-1 agreement {format_percent(found.top1_agreement)}"
        )


def task_scores(checkpoint: Path, tasks: Sequence[str], limit: int | None) -> list[TaskScore]:
    """Scores of every task; one that cannot be had has its reason in the place of a score."""
    if not tasks:
        return []
    import torch

    from lmq.checkpoint.open import open_model_directory
    from lmq.evaluation.zero_shot import load_task, measure_task
    from lmq.text.calibration import load_tokenizer

    model = open_model_directory(checkpoint, dtype=torch.float32, dense=True)
    tokenizer = load_tokenizer(checkpoint)
    scores: list[TaskScore] = []
    for task in tasks:
        try:
            scores += measure_task(model, tokenizer, load_task(task), limit=limit)
        except LmqError as error:
            scores.append(TaskScore(task=task, error=str(error)))
    return scores


def format_score(score: TaskScore) -> str:
    """`acc 61.2% ± 1.3% (n = 1838)`, or why there is none."""
    from lmq.report.results import format_percent

    if score.error is not None:
        return f"was not measured: {score.error}"
    stderr = "" if score.stderr is None else f" ± {format_percent(score.stderr)}"
    return f"{score.metric} {format_percent(score.value)}{stderr} (n = {score.samples})"


def _print_performance(checkpoint: Path, threads: int) -> None:
    from lmq.evaluation.performance import measure_performance
    from lmq.report.results import format_bytes

    found = measure_performance(checkpoint, threads=threads)
    disk = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    say(
        f"on disk {format_bytes(disk)}, resident {format_bytes(found.memory_resident_bytes)}, "
        f"at most {format_bytes(found.peak_generation_bytes)} while generating"
    )
    say(
        f"prompt {found.prompt_tokens_per_second:.1f} tokens/s ({found.prompt_tokens} tokens), "
        f"generation {found.generation_tokens_per_second:.1f} tokens/s; on {found.host}"
    )
