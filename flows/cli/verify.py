"""`lmq verify`: whether a checkpoint is as it was written, and what its bytes are."""

from __future__ import annotations

import argparse

from rich.table import Table

from lmq_flows.cli.arguments import add_checkpoint
from lmq_flows.cli.terminal import console, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq verify`."""
    add_checkpoint(parser)
    parser.set_defaults(command=verify_command)


def verify_command(arguments: argparse.Namespace) -> int:
    """Print every damage and return 1, or print the sizes."""
    from lmq.checkpoint.verify import checkpoint_sizes, find_damage, read_checksums, read_quantization_config

    path = arguments.checkpoint
    damages = list(find_damage(path))
    for damage in damages:
        say(damage, style="red")
    if damages:
        say(f"{len(damages)} damaged; write or download the checkpoint again")
        return 1
    recorded = read_checksums(path)
    say(
        "there is no checksums.json: headers and shapes are right, contents were not checked"
        if recorded is None
        else f"{len(recorded['tensors'])} tensors and {len(recorded['files'])} files are as they were written (sha256)"
    )
    sizes = checkpoint_sizes(path)
    table = Table(box=None, header_style="bold")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for part, size_bytes in (
        (f"{len(read_quantization_config(path).modules)} quantized matrices", sizes.quantized_bytes),
        ("other tensors", sizes.unquantized_bytes),
        ("headers of the weight files", sizes.header_bytes),
        ("other files", sizes.other_bytes),
        ("all", sizes.total_bytes),
    ):
        table.add_row(part, f"{size_bytes:,}")
    console.print(table)
    return 0
