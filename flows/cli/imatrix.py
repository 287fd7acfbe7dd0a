"""`lmq imatrix`: an importance matrix for llama-quantize from the second moments of a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmq_flows.cli.terminal import run_directory, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq imatrix`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run (runs/demo), or its name")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write, as in im.gguf")
    parser.add_argument("--model", metavar="NAME", help="one of the run's models, where it has several")
    parser.set_defaults(command=imatrix_command)


def imatrix_command(arguments: argparse.Namespace) -> int:
    """Write the diagonal of the second moments that the run's quantizer saw."""
    from lmq_flows.studies.imatrix import write_run_imatrix

    matrices, what = write_run_imatrix(run_directory(arguments.run), arguments.model, arguments.output)
    say(f"{arguments.output}: {what} second moments of {matrices} matrices; use it with")
    say(f"llama-quantize --imatrix {arguments.output} FULL.gguf OUT.gguf Q4_K_M")
    return 0
