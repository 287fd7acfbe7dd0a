"""Command line `lmq`: parse, dispatch, and turn expected errors into one message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lmq.export import FORMATS
from lmq_flows.studies.pruning_metrics import PRUNING_METRICS

Command = Callable[[argparse.Namespace], int]

_QUIET_LIBRARIES = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
"""Settings for a readable terminal; what the user's environment says wins."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (the work failed) or 2 (what was given cannot be used)."""
    quiet_libraries()
    arguments = _parse(argv)
    from lmq.errors import LmqError
    from lmq_storage import StoreError

    try:
        return arguments.command(arguments)
    except (LmqError, StoreError) as error:
        print(f"lmq: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lmq: interrupted; finished work is kept, run again to go on", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"lmq: {error}", file=sys.stderr)
        return 1


def quiet_libraries() -> None:
    """Settings for a readable terminal, in the environment; libraries read them when they are imported."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments. argparse ends a list of arguments at an option: what follows the option joins the list here."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("budgets" not in arguments or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.budgets += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmq", description="Make language models smaller with the least loss, under a byte budget."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_config(commands, "run", "commands.run_command", "measure, allocate, quantize, evaluate and report")
    _add_config(commands, "plan", "commands.plan_command", "say what a run would do, what is cached, and why")
    inspect = _add(commands, "inspect", "models.inspect_command", "show what a model is made of and what it weighs")
    _add_model(inspect)
    _add_budget(commands)
    evaluate = _add(commands, "evaluate", "evaluate.evaluate_command", "judge a checkpoint on a text and on tasks")
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint of lmq or a plain model")
    evaluate.add_argument(
        "--text", default="pydoc-topics", help="file, wikitext2, c4, ptb or data set (default: %(default)s)"
    )
    evaluate.add_argument("--column", default="text", help="field of jsonl, parquet, data sets (default: %(default)s)")
    evaluate.add_argument("--tokens", type=_at_least(1), default=8192, help="tokens to use (default: %(default)s)")
    evaluate.add_argument(
        "--window", type=_at_least(1), default=1024, help="tokens seen at once (default: %(default)s)"
    )
    evaluate.add_argument(
        "--stride", type=_at_least(1), default=512, help="tokens scored per window (default: %(default)s)"
    )
    evaluate.add_argument(
        "--reference", type=Path, metavar="MODEL", help="directory of the unquantized model: KL and agreement to it"
    )
    _add_list(evaluate, "--tasks", [], "zero-shot tasks of lm-eval, by name or as local .yaml files")
    evaluate.add_argument("--limit", type=_at_least(1), help="questions per task (default: all)")
    evaluate.add_argument("--performance", action="store_true", help="also measure memory and speed, on this machine")
    evaluate.add_argument(
        "--threads", type=_at_least(1), default=1, help="threads to measure speed with (default: %(default)s)"
    )
    report = _add(commands, "report", "commands.report_command", "print a run's table; compare several runs")
    report.add_argument("run", type=Path, nargs="+", metavar="RUN", help="run directory (runs/demo) or its name")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    form.add_argument("--latex", action="store_true", help="print the table as a LaTeX tabular (booktabs)")
    report.add_argument(
        "--output", type=Path, default=Path("comparison.html"), help="page of several runs (default: %(default)s)"
    )
    text = "check every byte of a checkpoint, and say what its bytes are"
    verify = _add(commands, "verify", "verify.verify_command", text)
    verify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of a checkpoint of lmq")
    _add_export(commands)
    _add_frontier(commands)
    _add_study(commands)
    _add_importance(commands)
    _add_prune(commands)
    _add(commands, "strategies", "commands.strategies_command", "list the strategies with their source")
    _add_store(commands)
    _add_serving(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, function: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=_lazy(function))
    return parser


def _add_config(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, function: str, text: str
) -> None:
    parser = _add(commands, name, function, text)
    parser.add_argument("config", metavar="CONFIG", help="run configuration (YAML), or the name of a preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="A.B=VALUE",
        help="override a key, as in evaluation.tokens=4096; repeatable",
    )
    parser.add_argument("--target", metavar="NAME", help="plan within what it holds, as in vllm; the key target")
    if name == "run":
        parser.add_argument("--runner", choices=("threads", "dask", "ray"), help="how work is spread; runner.kind")
    if name == "plan":
        parser.add_argument("--layers", action="store_true", help="one line per layer instead of per stage")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, .gguf file or package:NAME/FILE")
    parser.add_argument("--store", default="store", help="where a converted model is kept (default: %(default)s)")


def _add_budget(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "what sizes a model can have, and what budgets for it become in bytes"
    budget = _add(commands, "budget", "models.budget_command", text)
    _add_model(budget)
    budget.add_argument(
        "budgets", nargs="*", metavar="BUDGET", help="as in 4.25, '80 MB', 'uniform b3g64 + 2%%'; any number of them"
    )
    budget.add_argument("--menu", metavar="b2g128,…", help="configurations to choose from (default: all that fit)")
    budget.add_argument(
        "--axis", type=int, choices=(0, 1), default=1, help="grouping in the hqq layout (default: %(default)s)"
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write a checkpoint in the format of another program, and check that it opens there as the same model"
    export = _add(commands, "export", "export.export_command", text)
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of a checkpoint of lmq")
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {format_.summary}" for name, format_ in FORMATS.items()),
    )
    export.add_argument("--output", type=Path, required=True, metavar="PATH", help="directory, or .gguf file, to write")
    export.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the float tensors of safetensors and hqq (default: as in the checkpoint; scales of hqq float16)",
    )
    export.add_argument(
        "--fidelity",
        choices=("size", "exact"),
        help="of gguf: the types nearest in size, or those that hold the checkpoint's values (default: size)",
    )
    export.add_argument(
        "--tensor-types",
        metavar="FILE",
        help="with gguf: also write the plan, for llama-quantize --tensor-type-file FILE",
    )
    export.add_argument("--no-check", action="store_true", help="do not open the export and compare it")


def _add_frontier(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "solve many budgets from the measurements of a finished run and draw cost against bytes"
    frontier = _add(commands, "frontier", "frontier.frontier_command", text)
    frontier.add_argument("run", type=Path, metavar="RUN", help="run directory (runs/demo) or its name")
    frontier.add_argument("--points", type=_at_least(2), default=100, help="budgets to solve (default: %(default)s)")
    frontier.add_argument(
        "--strategy", default="loss-aware", help="whose costs, as in the run's table (default: %(default)s)"
    )
    frontier.add_argument("--model", metavar="NAME", help="one of the run's models (default: all)")


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "study the measurements: do they agree, and do they predict"
    studies = commands.add_parser("study", help=text, description=text).add_subparsers(required=True, metavar="STUDY")
    text = "is the sensitivity pattern over the layers the same across texts, quantizers, bit widths and models"
    sensitivity = _add(studies, "sensitivity", "studies.sensitivity_command", text)
    sensitivity.add_argument("models", nargs="+", metavar="MODEL", help="as for `lmq inspect`; any number of them")
    _add_list(sensitivity, "--text", ["pydoc-topics"], "calibration texts")
    _add_list(sensitivity, "--quantizer", ["hqq"], "quantizers", choices=("hqq", "rtn", "hqq-package", "nf4"))
    _add_list(sensitivity, "--config", ["b4g64"], "configurations")
    text = "how well do cheap costs predict the measured divergence of a model with one module quantized"
    costs = _add(studies, "costs", "studies.costs_command", text)
    costs.add_argument("model", metavar="MODEL", help="as for `lmq inspect`")
    costs.add_argument("--text", default="pydoc-topics", help="calibration text (default: %(default)s)")
    _add_list(costs, "--config", ["b2g64", "b3g64", "b4g64"], "configurations to draw from")
    for name, default, help_text in (
        ("--pairs", 60, "modules and configurations to draw"),
        ("--exact-sequences", 4, "sequences that the divergence is measured on"),
        ("--draws", 4, "draws of labels per sequence, for the sequence-wise Fisher cost"),
    ):
        costs.add_argument(name, type=_at_least(1), default=default, help=f"{help_text} (default: %(default)s)")
    costs.add_argument("--seed", type=_at_least(0), default=0, help="seed of the sample (default: %(default)s)")
    for parser, name in ((sensitivity, "sensitivity"), (costs, "costs")):
        parser.add_argument(
            "--sequences", type=_at_least(1), default=16, help="calibration sequences (default: %(default)s)"
        )
        parser.add_argument(
            "--sequence-length", type=_at_least(8), default=512, help="tokens of each (default: %(default)s)"
        )
        parser.add_argument("--threads", type=_at_least(1), default=2, help="threads to use (default: %(default)s)")
        parser.add_argument("--store", default="store", help="where measurements are kept (default: %(default)s)")
        parser.add_argument(
            "--out", type=Path, default=Path("runs") / f"study-{name}", help="where results go (default: %(default)s)"
        )


def _add_list(
    parser: argparse.ArgumentParser, option: str, default: list[str], text: str, choices: Sequence[str] | None = None
) -> None:
    parser.add_argument(
        option, nargs="+", default=default, choices=choices, metavar=option.strip("-").upper(),
        help=f"{text} (default: {' '.join(default) or 'none'})",
    )  # fmt: skip


def _add_importance(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure how much a model needs each of its layers, by several metrics"
    importance = _add(commands, "importance", "importance.importance_command", text)
    _add_importance_options(importance)
    importance.add_argument(
        "--angular-layers",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="also the angular distance over blocks of N layers (default: %(default)s)",
    )
    importance.add_argument("--without", choices=("removal",), help="leave out what is slow to measure")
    importance.add_argument(
        "--out", type=Path, metavar="DIR", help="where tables and figure go (default: runs/importance-MODEL)"
    )


def _add_prune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write a shallower checkpoint without the least important layers, and say what that costs"
    prune = _add(commands, "prune", "importance.prune_command", text)
    _add_importance_options(prune)
    prune.add_argument(
        "--metric",
        required=True,
        choices=PRUNING_METRICS,
        metavar="METRIC",
        help=f"what chooses the layers: {', '.join(PRUNING_METRICS)} (of neighbouring layers)",
    )
    prune.add_argument("--fraction", type=float, default=0.25, help="share of the layers (default: %(default)s)")
    prune.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the checkpoint")
    prune.add_argument(
        "--evaluation", default="pydoc-topics", metavar="TEXT", help="text to judge on (default: %(default)s)"
    )
    prune.add_argument("--tokens", type=_at_least(16), default=8192, help="tokens of it (default: %(default)s)")
    prune.add_argument("--window", type=_at_least(8), default=1024, help="tokens seen at once (default: %(default)s)")
    prune.add_argument(
        "--random", type=_at_least(0), default=1, help="random choices to compare with (default: %(default)s)"
    )
    prune.add_argument("--seed", type=_at_least(0), default=42, help="seed of the first of them (default: %(default)s)")


def _add_importance_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, .gguf file or package:NAME/FILE")
    parser.add_argument(
        "--text", default="pydoc-topics", help="text to measure on, the first half of it (default: %(default)s)"
    )
    parser.add_argument("--column", default="text", help="field of jsonl, parquet, data sets (default: %(default)s)")
    parser.add_argument("--sequences", type=_at_least(1), default=4, help="sequences of it (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=_at_least(8), default=512, help="tokens of each (default: %(default)s)"
    )
    shapley = parser.add_mutually_exclusive_group()
    shapley.add_argument(
        "--level", type=_at_least(1), help="Shapley values from windows of up to so many sub-layers (default: 3)"
    )
    shapley.add_argument(
        "--permutations",
        type=_at_least(1),
        metavar="N",
        help="Shapley values from N random orders instead, with standard errors",
    )
    parser.add_argument("--threads", type=_at_least(1), default=2, help="threads to use (default: %(default)s)")
    parser.add_argument("--store", default="store", help="where measurements are kept (default: %(default)s)")


def _add_store(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "look after the artifact store"
    actions = commands.add_parser("store", help=text, description=text).add_subparsers(required=True, metavar="ACTION")
    ls = _add(actions, "ls", "store.ls_command", "what is there, by run and stage, and its size")
    verify = _add(actions, "verify", "store.verify_command", "read every byte and name what is damaged")
    gc = _add(actions, "gc", "store.gc_command", "remove what the newest runs do not need")
    gc.add_argument(
        "--keep-runs",
        type=_at_least(0),
        default=3,
        metavar="N",
        help="newest runs to keep; those in progress always are (default: %(default)s)",
    )
    gc.add_argument(
        "--keep-hours",
        type=_at_least(0, float),
        default=24.0,
        metavar="H",
        help="keep what is newer (default: %(default)s)",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    for parser in (ls, verify, gc):
        parser.add_argument("--store", default="store", help="directory or URL (default: %(default)s)")


def _add_serving(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "start a Prefect server with lmq's deployments and a worker, until Ctrl-C"
    serve = _add(commands, "serve", "serving.serve_command", text)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_at_least(1), default=4200, help="port of UI and API (default: %(default)s)")
    serve.add_argument("--runs-at-once", type=_at_least(1), default=1, help="runs of the worker (default: %(default)s)")
    text = "put lmq's work pools and deployments on the Prefect server that PREFECT_API_URL names"
    deploy = _add(commands, "deploy", "serving.deploy_command", text)
    for parser in (serve, deploy):
        parser.add_argument(
            "--store", default=os.environ.get("LMQ_STORE", "store"),
            help="where deployed flows keep artifacts (default: $LMQ_STORE, else store)",
        )  # fmt: skip
        parser.add_argument(
            "--runs", default=os.environ.get("LMQ_RUNS", "runs"),
            help="where they write results (default: $LMQ_RUNS, else runs)",
        )  # fmt: skip


def _at_least(least: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A type of argument: a number that is not below `least`."""

    def convert(text: str) -> float:
        number = kind(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is not allowed; give {least} or more")
        return number

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def _lazy(function: str) -> Command:
    """The command `module.function` of this package, imported only when it is used: `lmq --help` is immediate."""
    module, _, name = function.partition(".")

    def call(arguments: argparse.Namespace) -> int:
        return getattr(importlib.import_module(f"lmq_flows.cli.{module}"), name)(arguments)

    return call
