"""Command that writes a checkpoint in the format of another program."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping

from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from lmq.checkpoint.write import verify_checkpoint
from lmq.errors import InputError
from lmq.export import FORMATS, export_format, write_export
from lmq.export.check import Difference, ExportCheck, export_checked
from lmq.export.report import ExportReport, ModuleStep, overall_relative_error
from lmq.export.source import QuantizedCheckpoint
from lmq_flows.cli.terminal import console

_OPTIONS = sorted({option for each in FORMATS.values() for option in each.options})


def export_command(arguments: argparse.Namespace) -> int:
    """Export, check what was written, and print what it is; 1 when the check fails."""
    disable_progress_bar()
    verify_checkpoint(arguments.checkpoint)
    checkpoint = QuantizedCheckpoint(arguments.checkpoint)
    options = _options(arguments)
    if arguments.no_check:
        report = write_export(checkpoint, arguments.output, arguments.format, options)
        _print_report(report, checkpoint, arguments.format)
        console.print("not checked", highlight=False)
        return 0
    report, check = export_checked(checkpoint, arguments.output, arguments.format, options)
    _print_report(report, checkpoint, arguments.format)
    _print_check(check)
    for failure in check.failures:
        console.print(f"check failed: {failure}", style="red", highlight=False, soft_wrap=True)
    if not check.passed:
        console.print(f"the export is kept as {report.path}", highlight=False, soft_wrap=True)
        return 1
    console.print(f"checked: {report.path}", highlight=False, soft_wrap=True)
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
    console.print(
        f"{format_name}: {len(files)} file{'s' * (len(files) != 1)}, {report.size_bytes:,} bytes, "
        f"{len(report.steps)} quantized matrices",
        highlight=False,
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
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _errors(steps: Mapping[str, ModuleStep], checkpoint: QuantizedCheckpoint) -> tuple[str, str, str]:
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
