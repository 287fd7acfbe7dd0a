"""A new command: how many tensors a directory of safetensors holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmq_flows.cli.terminal import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The directory."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a directory of safetensors")
    parser.set_defaults(command=count_command)


def count_command(arguments: argparse.Namespace) -> int:
    """Print the number of tensors."""
    from lmq.model.tensors import read_headers

    console.print(f"{len(read_headers(arguments.model))} tensors")
    return 0
