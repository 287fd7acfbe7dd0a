"""Section 4: what did it cost. Section 5: how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lmq.report.data import ReportData, StageTiming
from lmq.report.html import Cell, Column, csv_link, details, not_measured, number, section, slug, table, text
from lmq.report.results import NOT_MEASURED, format_bytes

MOST_STAGE_ROWS = 200
_PEAK = (
    "Time of what was cached is not counted. Peak memory is that of the process while the stage ran; stages that "
    "shared a process with others (runner.workers above 1) have none."
)


def costs_section(data: ReportData) -> str:
    """Time and bytes of every stage, ran or cached."""
    if not data.stages:
        return section("costs", "What did it cost?", not_measured("Stages"))
    ran = [stage for stage in data.stages if stage.state == "ran"]
    spent = _total([stage.seconds for stage in ran])
    kept = _total([stage.size_bytes for stage in data.stages])
    lead = (
        f"<p>{len(ran)} of {len(data.stages)} stages ran, {format_duration(spent)} in all; "
        f"{len(data.stages) - len(ran)} came from the cache. "
        f"The run keeps {format_bytes(None if kept is None else int(kept))}.</p>"
    )
    rows = [(s.stage, s.label, s.state, s.seconds, s.size_bytes, s.peak_memory_bytes) for s in data.stages]
    header = ["stage", "label", "state", "seconds", "size_bytes", "peak_memory_bytes"]
    link = csv_link(f"stages-{slug(data.run)}.csv", header, rows)
    each = details(f"Every stage ({len(data.stages)})", _every_stage(data.stages))
    return section(
        "costs", "What did it cost?", f'{lead}{_by_stage(data.stages)}<p class="note">{_PEAK} {link}</p>{each}'
    )


def reproduce_section(data: ReportData) -> str:
    """Configuration, digests and versions."""
    config = (
        f"<p>Save this as <code>config.yaml</code> and run <code>lmq run config.yaml</code>.</p>"
        f"<pre>{escape(data.config)}</pre>"
        if data.config
        else not_measured("Configuration")
    )
    digests = _pairs("Digests", "What", data.digests, "SHA-256")
    versions = _pairs("Versions", "Package", data.versions, "Version")
    return section("reproduce", "How do I reproduce it?", f"{config}{digests}{versions}")


def format_duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _by_stage(stages: Sequence[StageTiming]) -> str:
    names = list(dict.fromkeys(stage.stage for stage in stages))
    groups = {name: [stage for stage in stages if stage.stage == name] for name in names}
    seconds = {name: _total([s.seconds for s in group if s.state == "ran"]) for name, group in groups.items()}
    longest = max((value for value in seconds.values() if value is not None), default=0.0)
    rows = [_stage_row(name, group, seconds[name], longest) for name, group in groups.items()]
    columns = [
        Column("Stage"),
        Column("Ran", True),
        Column("Cached", True),
        Column("Time", True),
        Column("Share of the longest"),
    ]
    columns += [Column("Kept", True), Column("Peak memory", True, "of the process, where it is known")]
    return table(columns, rows, "Time and bytes by stage")


def _stage_row(name: str, group: Sequence[StageTiming], seconds: float | None, longest: float) -> list[Cell]:
    ran = sum(stage.state == "ran" for stage in group)
    bar = f'<i style="width:{100 * seconds / longest:.1f}%"></i>' if seconds and longest else ""
    kept = _total([stage.size_bytes for stage in group])
    peak = max((stage.peak_memory_bytes for stage in group if stage.peak_memory_bytes is not None), default=None)
    return [
        text(name),
        number(str(ran), ran),
        number(str(len(group) - ran), len(group) - ran),
        number(format_duration(seconds), seconds),
        Cell(f'<span class="bar">{bar}</span>', seconds),
        number(format_bytes(None if kept is None else int(kept)), kept),
        number(format_bytes(peak), peak),
    ]


def _every_stage(stages: Sequence[StageTiming]) -> str:
    columns = [Column("Stage"), Column("For"), Column("State"), Column("Time", True), Column("Kept", True)]
    columns.append(Column("Peak memory", True))
    rows = [
        [
            text(stage.stage),
            text(stage.label),
            text(stage.state),
            number(format_duration(stage.seconds), stage.seconds),
            number(format_bytes(stage.size_bytes), stage.size_bytes),
            number(format_bytes(stage.peak_memory_bytes), stage.peak_memory_bytes),
        ]
        for stage in stages[:MOST_STAGE_ROWS]
    ]
    rest = len(stages) - len(rows)
    note = f'<p class="note">{rest} more are in the CSV.</p>' if rest > 0 else ""
    return table(columns, rows, "Every stage") + note


def _total(values: Sequence[float | None]) -> float | None:
    """Sum of what was measured; None when nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _pairs(caption: str, name: str, pairs: Mapping[str, str], value: str) -> str:
    if not pairs:
        return not_measured(caption)
    rows = [[text(key), Cell(f"<code>{escape(pairs[key])}</code>", pairs[key])] for key in sorted(pairs)]
    return table([Column(name), Column(value)], rows, caption, sortable=False)
