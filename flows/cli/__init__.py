"""Command line `lmq`: find the command, and turn expected errors into one message and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lmq_flows.cli.arguments import add_command

COMMANDS = {
    "quantize": "make one model smaller: to a size in bytes, or to bits per weight",
    "run": "measure, allocate, quantize, evaluate and report",
    "plan": "say what a run would do, what is cached, and why",
    "inspect": "show what a model is made of and how large it is",
    "budget": "show which sizes a model can have, and what a budget means in bytes",
    "evaluate": "measure how good a checkpoint is, on a text and on tasks",
    "compare": "put checkpoints side by side: perplexity, divergence from the first, size, memory and speed, samples",
    "report": "print a run's table; compare several runs",
    "verify": "check every byte of a checkpoint, and say what its bytes are",
    "export": "write a checkpoint in the format of another program, and check that it opens there as the same model",
    "imatrix": "write the importance matrix that llama-quantize reads, from what a finished run measured",
    "frontier": "solve many budgets from the measurements of a finished run, and draw cost against bytes",
    "study": "study the measurements: do they agree, and do they predict?",
    "importance": "measure how much a model needs each of its layers, by several metrics",
    "prune": "write a checkpoint without the least important layers, and say what that costs",
    "strategies": "list the strategies with their source",
    "store": "look after the artifact store",
    "doctor": "look at this machine: versions that break, hardware, disks, server and hub, and what to do",
    "completion": "print what a shell needs to complete commands and options",
    "serve": "start a Prefect server with lmq's deployments and a worker, until Ctrl-C",
    "deploy": "put lmq's work pools and deployments on the Prefect server that PREFECT_API_URL names",
}
"""Every command with its line of help. Command `x` is the file `x.py` beside this one, imported only when it is used.

Its `add_arguments(parser)` declares the arguments and sets the default `command`, a function from the parsed arguments
to the exit code. A command whose list of arguments may go on after an option names that list as `continued_list`.
"""

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

_WITHOUT_COMPILER = "TORCHDYNAMO_DISABLE"
"""transformers imports hqq, whose decorators import torch's compiler: a second of every command, and none compiles.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (the work failed) or 2 (the input cannot be used)."""
    quiet_libraries()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    from lmq.errors import LmqError
    from lmq_storage import StoreError

    try:
        with _stopped_like_ctrl_c():
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


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and a closed terminal stop a command as Ctrl-C does: a server that was started for it ends too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def quiet_libraries() -> None:
    """Settings for a readable terminal, in the environment; libraries read them when they are imported."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if "torch" not in sys.modules:  # a process that is not the command's own may compile
        os.environ.setdefault(_WITHOUT_COMPILER, "1")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. argparse ends a list of arguments at an option: what follows the option joins the list here."""
    parser = _parser(argv[:1])
    arguments, rest = parser.parse_known_args(argv)
    continued: str | None = getattr(arguments, "continued_list", None)
    if rest and (continued is None or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and continued is not None:
        getattr(arguments, continued).extend(rest)
    return arguments


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of every command."""
    return _parser(list(COMMANDS))


def _parser(commands: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of these commands, as of the one that was given: `lmq --help` imports none."""
    parser = argparse.ArgumentParser(
        prog="lmq", description="Make language models smaller with the least loss, under a byte budget."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = add_command(subparsers, name, text)
        if name in commands:
            importlib.import_module(f"{__name__}.{name}").add_arguments(command)
    return parser
