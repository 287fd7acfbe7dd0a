"""`lmq study`: do sensitivity patterns agree, and do cheap costs predict the exact one?"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from lmq.formats.nf4 import NormalFloat4
from lmq.report.figures.standalone import standalone_svg
from lmq.report.figures.study import cost_scatters, sensitivity_figures
from lmq.report.sections.study import costs_page, sensitivity_page
from lmq.report.study import (
    DIMENSIONS,
    Agreement,
    AgreementSummary,
    CostPair,
    CostQuality,
    agreements,
    cost_qualities,
    models_by_layers,
    summarize_agreements,
)
from lmq_flows.cli.arguments import add_command, add_list, add_number, add_store
from lmq_flows.cli.terminal import console, say
from lmq_flows.run.prepare import check_directory
from lmq_flows.studies.study import (
    STUDY_QUANTIZERS,
    CostStudy,
    Profiles,
    SensitivityStudy,
    StudyOptions,
    stored_bits_per_weight,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the studies of `lmq study` with their arguments."""
    studies = parser.add_subparsers(required=True, metavar="STUDY")
    text = "does the sensitivity pattern over the layers stay the same across texts, quantizers, bit widths and models?"
    sensitivity = add_command(studies, "sensitivity", text)
    sensitivity.add_argument("models", nargs="+", metavar="MODEL", help="any number of models, as for `lmq inspect`")
    default = SensitivityStudy
    add_list(sensitivity, "--text", default.texts, "calibration texts")
    add_list(sensitivity, "--quantizer", default.quantizers, "quantizers", choices=STUDY_QUANTIZERS)
    add_list(sensitivity, "--config", default.configurations, "configurations")
    sensitivity.set_defaults(command=sensitivity_command)
    text = "how well do cheap costs predict the measured divergence of a model with one module quantized?"
    costs = add_command(studies, "costs", text)
    _add_costs_arguments(costs)
    costs.set_defaults(command=costs_command)
    for study, name in ((sensitivity, "sensitivity"), (costs, "costs")):
        options = StudyOptions()
        add_number(study, "--sequences", options.sequences, "calibration sequences")
        add_number(study, "--sequence-length", options.sequence_length, "tokens in each sequence", least=8)
        add_number(study, "--threads", options.threads, "threads to use")
        add_store(study)
        study.add_argument(
            "--out",
            type=Path,
            default=Path("runs") / f"study-{name}",
            help="where results are written (default: %(default)s)",
        )


def _add_costs_arguments(parser: argparse.ArgumentParser) -> None:
    default = CostStudy
    parser.add_argument("model", metavar="MODEL", help="a model, as for `lmq inspect`")
    parser.add_argument("--text", default=default.text, help="calibration text (default: %(default)s)")
    add_list(parser, "--config", default.configurations, "configurations to draw from")
    add_number(parser, "--pairs", default.pairs, "pairs of a module and a configuration to draw")
    add_number(parser, "--exact-sequences", default.exact_sequences, "sequences to measure the divergence on")
    add_number(
        parser, "--draws", default.label_draws, "draws of labels per sequence, for the sequence-wise Fisher cost"
    )
    add_number(parser, "--seed", default.seed, "seed of the drawn pairs", least=0)


def sensitivity_command(arguments: argparse.Namespace) -> int:
    """Measure sensitivity in every combination and print how well the patterns over the layers agree."""
    check_directory(arguments.out, "--out")
    study = SensitivityStudy(
        models=tuple(arguments.models),
        texts=tuple(arguments.text),
        quantizers=tuple(arguments.quantizer),
        configurations=tuple(arguments.config),
        options=_options(arguments),
    )
    profiles = study.measure(console)
    found = agreements(profiles)
    summaries = summarize_agreements(found)
    notes = [*_depth_notes(profiles), *_nf4_notes(profiles)]
    _print_summaries(summaries)
    for note in notes:
        say(note)
    figures = sensitivity_figures(profiles)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "sensitivity.csv", _SENSITIVITY_COLUMNS, _sensitivity_rows(profiles))
    _write_csv(out / "correlations.csv", _AGREEMENT_COLUMNS, _agreement_rows(found))
    (out / "study.svg").write_text(standalone_svg(figures), encoding="utf-8")
    (out / "study.html").write_text(sensitivity_page(summaries, figures, notes), encoding="utf-8")
    return _say_where(out, ("sensitivity.csv", "correlations.csv", "study.svg", "study.html"))


def costs_command(arguments: argparse.Namespace) -> int:
    """Measure cheap and exact costs of a sample of modules and print how well the cheap ones order it."""
    check_directory(arguments.out, "--out")
    study = CostStudy(
        model=arguments.model,
        text=arguments.text,
        configurations=tuple(arguments.config),
        pairs=arguments.pairs,
        exact_sequences=arguments.exact_sequences,
        label_draws=arguments.draws,
        seed=arguments.seed,
        options=_options(arguments),
    )
    pairs = study.measure(console)
    qualities = cost_qualities(pairs)
    _print_qualities(qualities)
    figures = cost_scatters(pairs, qualities)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    header, rows = _pair_table(pairs)
    _write_csv(out / "costs.csv", header, rows)
    (out / "study.svg").write_text(standalone_svg(figures, columns=2), encoding="utf-8")
    (out / "study.html").write_text(costs_page(qualities, figures), encoding="utf-8")
    return _say_where(out, ("costs.csv", "study.svg", "study.html"))


def _options(arguments: argparse.Namespace) -> StudyOptions:
    return StudyOptions(
        sequences=arguments.sequences,
        sequence_length=arguments.sequence_length,
        store=arguments.store,
        threads=arguments.threads,
    )


def _print_summaries(summaries: Sequence[AgreementSummary]) -> None:
    if not summaries:
        console.print("Nothing to compare: give more than one text, quantizer, configuration or model of equal depth")
        return
    parts = list(dict.fromkeys(part for summary in summaries for part in summary.by_part))
    table = Table("Dimension", "Between", title="Spearman's ρ of sensitivity over the layers", title_justify="left")
    for column in (*parts, "Mean", "Lowest", "Mean of steps"):
        table.add_column(column, justify="right")
    for summary in summaries:
        values = [*(summary.by_part.get(part) for part in parts), summary.profiles, summary.lowest, summary.steps]
        table.add_row(summary.dimension, f"{summary.first} – {summary.second}", *map(_correlation, values))
    console.print(table)
    console.print(
        "Steps are the ratios between neighbouring layers: their ρ leaves out the common rise with depth.",
        highlight=False,
    )


def _print_qualities(qualities: Sequence[CostQuality]) -> None:
    pairs = qualities[0].pairs if qualities else 0
    title = f"Spearman's ρ with the measured divergence of one module alone, {pairs} modules and configurations"
    table = Table("Cost", title=title, title_justify="left")
    for column in ("All pairs", "± 1 standard error", "Within a configuration"):
        table.add_column(column, justify="right")
    for quality in qualities:
        values = (quality.rho, quality.rho_stderr, quality.within)
        table.add_row(quality.cost, *map(_correlation, values))
    console.print(table)


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _depth_notes(profiles: Profiles) -> list[str]:
    """A sentence when models were not compared for having different numbers of layers."""
    groups = models_by_layers(profiles)
    if len(groups) < 2:
        return []
    named = "; ".join(f"{layers} layers: {', '.join(names)}" for layers, names in sorted(groups.items()))
    return [f"Models with different numbers of layers are not compared with each other ({named})."]


def _nf4_notes(profiles: Profiles) -> list[str]:
    """A sentence on what NF4 is where it was measured, since it has none of the configurations."""
    found = sorted({setting.configuration for setting in profiles if setting.quantizer == NormalFloat4.name})
    if not found:
        return []
    return [
        f"NF4 at {', '.join(found)} stands for 4-bit NormalFloat in groups of that size, with a float32 divisor "
        "per group, and so more bits than the configuration."
    ]


_AGREEMENT_COLUMNS = [
    "dimension",
    *(f"first_{name}" for name in DIMENSIONS),
    *(f"second_{name}" for name in DIMENSIONS),
    "part",
    "profiles",
    "steps",
]


def _agreement_rows(found: Sequence[Agreement]) -> Iterable[list[object]]:
    for item in found:
        values = [getattr(setting, name) for setting in (item.first, item.second) for name in DIMENSIONS]
        yield [item.dimension, *values, item.part, item.profiles, item.steps]


_SENSITIVITY_COLUMNS = [*DIMENSIONS, "bits_per_weight", "part", "layer", "sensitivity"]
"""`bits_per_weight` are the quantizer's own: NF4 measured at b4g64 has groups of 64, and 4.5 bits with its divisors."""


def _sensitivity_rows(profiles: Profiles) -> Iterable[list[object]]:
    for setting, by_part in profiles.items():
        values = [*(getattr(setting, name) for name in DIMENSIONS), stored_bits_per_weight(setting)]
        for part, profile in by_part.items():
            for layer, value in enumerate(profile):
                yield [*values, part, layer, value]


def _pair_table(pairs: Sequence[CostPair]) -> tuple[list[str], list[list[object]]]:
    names = list(pairs[0].cheap)
    header = ["layer", "kind", "configuration", "divergence", "divergence_stderr", *names]
    rows: list[list[object]] = [
        [pair.module.layer, pair.module.kind, pair.spec.name, pair.exact, pair.exact_stderr]
        + [pair.cheap.get(name) for name in names]
        for pair in pairs
    ]
    return header, rows


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _say_where(out: Path, names: Sequence[str]) -> int:
    for name in names:
        say(out / name)
    return 0
