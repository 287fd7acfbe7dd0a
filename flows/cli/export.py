"""`lmq export`: a checkpoint in the format of another program."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lmq.errors import InputError
from lmq.export import FORMATS, export_format, write_export
from lmq_flows.cli.arguments import add_checkpoint
from lmq_flows.cli.terminal import console, say

if TYPE_CHECKING:
    from lmq.export.check import Difference, ExportCheck
    from lmq.export.report import ExportReport, ModuleStep
    from lmq.export.source import QuantizedCheckpoint

_OPTIONS = sorted({option for each in FORMATS.values() for option in each.options})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq export`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {format_.summary}" for name, format_ in FORMATS.items()),
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="directory or .gguf file to write"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of the floating-point tensors, for safetensors and hqq "
        "(default: as in the checkpoint; for hqq, scales in float16)",
    )
    parser.add_argument(
        "--fidelity",
        choices=("size", "exact"),
        help="for gguf, size: types of about the checkpoint's size; exact: types that hold its values exactly "
        "(default: size)",
    )
    parser.add_argument(
        "--tensor-types",
        metavar="FILE",
        help="for gguf: also write FILE, the type of every tensor, for llama-quantize --tensor-type-file FILE",
    )
    parser.add_argument("--no-check", action="store_true", help="do not open the export and compare it")
    parser.set_defaults(command=export_command)


def export_command(arguments: argparse.Namespace) -> int:
    """Export, check what was written, and print what it is; 1 when the check fails."""
    from transformers.utils.logging import disable_progress_bar

    from lmq.checkpoint.write import verify_checkpoint
    from lmq.export.check import export_checked
    from lmq.export.source import QuantizedCheckpoint

    disable_progress_bar()
    verify_checkpoint(arguments.checkpoint)
    checkpoint = QuantizedCheckpoint(arguments.checkpoint)
    options = _options(arguments)
    if arguments.no_check:
        report = write_export(checkpoint, arguments.output, arguments.format, options)
        _print_report(report, checkpoint, arguments.format)
        say("not checked")
        return 0
    report, check = export_checked(checkpoint, arguments.output, arguments.format, options)
    _print_report(report, checkpoint, arguments.format)
    _print_check(check)
    for failure in check.failures:
        say(f"check failed: {failure}", style="red")
    if not check.passed:
        say(f"the export is kept as {report.path}")
        return 1
    say(f"checked: {report.path}")
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, str]:
    """The options that were given, all of which must be known to the format."""
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    known = export_format(arguments.format).options
    for name in options:
        if name not in known:
            allowed = ", ".join(map(_flag, known)) or "none"
            raise InputError(f"{_flag(name)} is not an option of {arguments.format} (its options: {allowed})")
    return options


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _print_report(report: ExportReport, checkpoint: QuantizedCheckpoint, format_name: str) -> None:
    files = [file for file in report.path.rglob("*") if file.is_file()] if report.path.is_dir() else [report.path]
    say(
        f"{format_name}: {len(files)} file{'s' * (len(files) != 1)}, {report.size_bytes:,} bytes, "
        f"{len(report.steps)} quantized matrices"
    )
    by_target: dict[str, dict[str, ModuleStep]] = defaultdict(dict)
    for path, step in report.steps.items():
        by_target[step.target][path] = step
    table = Table("Became", title_justify="left")
    for column in ("Matrices", "Relative error", "Largest"):
        table.add_column(column, justify="right")
    for target, steps in sorted(by_target.items()):
        table.add_row(target, *_errors(steps, checkpoint))
    if len(by_target) > 1:
        table.add_row("all", *_errors(report.steps, checkpoint))
    console.print(table)
    for note in report.notes:
        say(f"note: {note}")


def _errors(steps: Mapping[str, ModuleStep], checkpoint: QuantizedCheckpoint) -> tuple[str, str, str]:
    from lmq.export.report import overall_relative_error

    worst = max(steps, key=lambda path: steps[path].relative_error)
    largest = steps[worst].relative_error
    return (
        str(len(steps)),
        f"{overall_relative_error(steps, checkpoint.shapes):.2e}",
        f"{largest:.2e} ({worst})" if largest else "0",
    )


def _print_check(check: ExportCheck) -> None:
    table = Table("Against the checkpoint", title_justify="left")
    for column in ("Logits, relative", "KL, nats", "Same top-1", "Same generated"):
        table.add_column(column, justify="right")
    table.add_row(
        f"export ({check.difference.tokens} predictions)", *_measured(check.difference), f"{check.greedy_agreement:.1%}"
    )
    table.add_row("noise of the same step errors", *_measured(check.noise), "–")
    console.print(table)


def _measured(difference: Difference) -> tuple[str, str, str]:
    return (
        f"{difference.logit_difference:.2e}",
        f"{difference.kl_divergence:.2e}",
        f"{difference.top1_agreement:.1%}",
    )
