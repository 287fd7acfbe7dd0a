"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

DEFAULT_STORE = "store"


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    """A parser for one of several commands, whose line of help is also the first sentence of its own help."""
    return commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")
    )


def at_least(least: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A type of argument: a number that is not below `least`."""

    def convert(text: str) -> float:
        number = kind(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is not allowed; give {least} or more")
        return number

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def add_number(parser: argparse.ArgumentParser, option: str, default: int, text: str, least: int = 1) -> None:
    """An option for a whole number, its default shown in the help."""
    parser.add_argument(option, type=at_least(least), default=default, help=f"{text} (default: %(default)s)")


def add_list(
    parser: argparse.ArgumentParser,
    option: str,
    default: Sequence[str],
    text: str,
    choices: Sequence[str] | None = None,
) -> None:
    """An option for any number of words."""
    parser.add_argument(
        option,
        nargs="+",
        default=list(default),
        choices=choices,
        metavar=option.strip("-").upper(),
        help=f"{text} (default: {' '.join(default) or 'none'})",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, directory, .gguf file, or package:NAME/FILE")


def add_store(parser: argparse.ArgumentParser, text: str = "where measurements are kept") -> None:
    """The option --store, a directory or URL."""
    parser.add_argument("--store", default=DEFAULT_STORE, help=f"{text} (default: %(default)s)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The argument CHECKPOINT for commands that take no other program's."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of a checkpoint that lmq wrote")


def add_column(parser: argparse.ArgumentParser, default: str) -> None:
    """The option --column."""
    parser.add_argument(
        "--column",
        default=default,
        help="field that holds the text in .jsonl, .parquet and data sets (default: %(default)s)",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """A run's configuration with what overrides its keys: CONFIG, --set and --target."""
    parser.add_argument("config", metavar="CONFIG", help="run configuration (a YAML file), or the name of a preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="A.B=VALUE",
        help="override one key, as in evaluation.tokens=4096; may be given several times",
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="use only configurations that this program can load, as in vllm (overrides the key target)",
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where deployed flows keep what they make: --store and --runs."""
    parser.add_argument(
        "--store",
        default=os.environ.get("LMQ_STORE", DEFAULT_STORE),
        help="where deployed flows keep artifacts (default: $LMQ_STORE, else store)",
    )
    parser.add_argument(
        "--runs",
        default=os.environ.get("LMQ_RUNS", "runs"),
        help="where deployed flows write results (default: $LMQ_RUNS, else runs)",
    )
