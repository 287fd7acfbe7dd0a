"""`lmq quantize`: one command from a model to a smaller one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lmq_flows.cli.arguments import add_model, add_store
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq_flows.run.one_model import MadeModel, PreparedGoal

_ASK_ABOVE_MINUTES = 30
_EFFORTS = ("quick", "normal", "best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq quantize`."""
    add_model(parser)
    how_small = parser.add_mutually_exclusive_group(required=True)
    how_small.add_argument(
        "--size",
        metavar="BYTES",
        help="size of the whole checkpoint, tokenizer included, as in 400MB; embedding and head are quantized too",
    )
    how_small.add_argument("--bits", type=float, help="bits per weight of the matrices in the blocks, as in 4.25")
    how_small.add_argument(
        "--plan",
        metavar="RUN_OR_FILE",
        help="the configurations that a run gave to a model of the same structure, such as the base model of a "
        "fine-tune: the run, or its allocation-*.csv; nothing is measured but what the quantizer needs",
    )
    how_small.add_argument(
        "--fit-gpu",
        metavar="BYTES",
        help="memory of a GPU, as in 24GB, for the checkpoint, the cache of --context and activations",
    )
    parser.add_argument(
        "--context",
        metavar="TOKENS",
        help="tokens that a program holds at once, as in 32k: for --fit-gpu, and for the memory said beforehand",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="directory to write, or .gguf file for llama.cpp (default: named after model and size)",
    )
    parser.add_argument(
        "--effort",
        choices=_EFFORTS,
        default="normal",
        help="quick: measured on 16 sequences of 512 tokens and judged on 2,048 tokens; normal: 32 and 8,192; best: 32 "
        "and 16,384, channels are rescaled, plans tried on the model itself, and of the best rounding is learned and "
        "scales are polished (default: %(default)s)",
    )
    parser.add_argument(
        "--equalize",
        action=argparse.BooleanOptionalAction,
        help="rescale channels between matrices first, where they are scaled unevenly: the same function, easier to "
        "quantize (default: with --effort best)",
    )
    parser.add_argument(
        "--yes", action="store_true", help=f"do not ask before what takes more than {_ASK_ABOVE_MINUTES} minutes"
    )
    parser.add_argument(
        "--for",
        dest="target",
        metavar="ENGINE",
        help="plan over what an engine holds and write what it opens: llama.cpp (a .gguf file, with embedding and head "
        "quantized, which --bits counts too), vllm (compressed-tensors: 4 and 8 bits), gptq (GPTQModel, SGLang: 2, 3, "
        "4 and 8 bits), gptq-symmetric (vLLM too: 4 and 8 bits), auto-round (transformers: 2 to 8 bits) or awq (4 bits "
        "for all)",
    )
    add_store(parser)
    parser.set_defaults(command=quantize_command)


def quantize_command(arguments: argparse.Namespace) -> int:
    """Make one checkpoint, and say how good it is and how it is used."""
    from lmq_flows.run.own_server import begin_own_server

    begin_own_server()
    from lmq_flows.run.one_model import Goal, prepare_goal, reach_goal

    goal = Goal(
        model=arguments.model,
        size=arguments.size,
        bits=arguments.bits,
        plan=arguments.plan,
        fit_gpu=arguments.fit_gpu,
        context=arguments.context,
        output=arguments.output,
        effort=arguments.effort,
        equalize=arguments.equalize,
        target=arguments.target,
        store=arguments.store,
    )
    prepared = prepare_goal(goal)
    if not _may_start(prepared, yes=arguments.yes):
        return 1
    made = reach_goal(prepared)
    _print_result(made, prepared)
    _print_samples(made, prepared)
    say(f"\nreport  {prepared.config.run_dir / 'report.html'}\nuse it with\n")
    say(_usage(made.path, prepared.goal.target))
    return 0


def _may_start(prepared: PreparedGoal, *, yes: bool) -> bool:
    """Say what the run will take, and ask where that is much and somebody is there to answer."""
    from lmq_flows.cli.inspect import summary
    from lmq_flows.run.expectation import expect, planned_nodes
    from lmq_flows.run.one_model import GPU_SET_ASIDE, GPU_SET_ASIDE_BYTES

    config = prepared.config
    expected = expect(config, prepared.structure, planned_nodes(config))
    minutes = expected.seconds / 60
    notes = config.left_out_of_menu(config.models[0], prepared.structure.quantized)
    say(f"{prepared.goal.name}: {summary(prepared.structure)}")
    say(
        f"run {config.name}: about {_minutes(minutes)} and {expected.memory_bytes / 1e9:.1f} GB of memory with "
        f"{config.runner.workers * config.runner.threads_per_worker} threads; "
        f"{expected.cached} of {expected.nodes} layers and variants are there already"
    )
    engine, matrices_bytes = prepared.goal.engine, prepared.matrices_bytes
    whole_bytes = matrices_bytes + prepared.beside_bytes
    say(f"at most {whole_bytes / 1e6:,.1f} MB on disk, {matrices_bytes / 1e6:,.1f} of them quantized matrices")
    if engine is not None:
        say(f"for {engine.description}; opened by {engine.opened_by}")
    in_memory = {"the checkpoint": whole_bytes, **prepared.beside_in_memory}
    if prepared.goal.fit_gpu is not None:
        in_memory[GPU_SET_ASIDE] = GPU_SET_ASIDE_BYTES
    if prepared.beside_in_memory:
        say(f"at most {sum(in_memory.values()) / 1e6:,.1f} MB in memory while it runs")
        for what, size_bytes in in_memory.items():
            say(f"  {size_bytes / 1e6:>12,.1f} MB  {what}")
    for note in notes:
        say(f"note: {note}")
    if minutes <= _ASK_ABOVE_MINUTES or yes or not sys.stdin.isatty():
        return True
    return console.input("start? [y/N] ").strip().lower() in ("y", "yes")


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return "1 minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _print_result(made: MadeModel, prepared: PreparedGoal) -> None:
    """The checkpoint between full precision and uniform bits of the same size."""
    from lmq.report.results import format_bytes, format_measured

    uniform = f"uniform at this size{', not tuned' if prepared.config.tuning else ''}"
    rows = {
        "full precision": (made.full_precision, made.full_precision.checkpoint_bytes),
        uniform: (made.uniform, made.uniform.checkpoint_bytes if made.uniform else None),
        f"{made.path}": (made.result, made.size_bytes),
    }
    table = Table("", "Whole size", "Bits per weight", "Perplexity", "KL to full precision")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (result, size_bytes) in rows.items():
        if result is None:
            table.add_row(name, "–", "–", "–", "–")
            continue
        bits = "–" if result.bits_per_weight is None else f"{result.bits_per_weight:.3f}"
        perplexity = format_measured(result.perplexity, result.perplexity_stderr)
        divergence = format_measured(result.kl_divergence, result.kl_divergence_stderr, decimals=3)
        table.add_row(name, format_bytes(size_bytes), bits, perplexity, divergence)
    console.print(table)
    if prepared.goal.size is not None:
        say(f"{made.size_bytes:,} bytes in all, where {prepared.goal.size} were asked for")


def _print_samples(made: MadeModel, prepared: PreparedGoal) -> None:
    """What both models write on from the same words."""
    from lmq_flows.run.samples import PROMPT, samples

    written = samples([prepared.model_dir, made.checkpoint])
    if written is None:
        say("no samples: both models are not sure to fit this machine's free memory")
        return
    say(f"\n{PROMPT!r} goes on\n")
    for name, text in zip(("full precision", "quantized"), written, strict=True):
        say(f"  {name:<15} {text!r}")


def _usage(path: Path, target: str | None) -> str:
    """Three lines of Python, or what the target is started with."""
    if target is not None:
        from lmq.allocation.targets import target_named

        return target_named(target).usage.format(path=str(path))
    return (
        "import lmq; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model, tokenizer = lmq.load("{path}"), AutoTokenizer.from_pretrained("{path}")\n'
        f'print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=30)[0]))'
    )
