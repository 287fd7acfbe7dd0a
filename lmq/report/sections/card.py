"""The model card of one variant: the README.md that lies in its checkpoint, in Markdown with a YAML head."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from lmq.formats.spec import QuantSpec
from lmq.model.losses import LOSSES
from lmq.model.source import ModelSource
from lmq.model.structure import without_number
from lmq.report.data import ModelReport, ReportData, Rows
from lmq.report.results import (
    UNIFORM,
    VariantResult,
    format_bytes,
    format_measured,
    format_number,
    format_percent,
    full_precision_of,
)


def model_card(data: ReportData, result: VariantResult) -> str:
    """The card of `result`, a quantized variant of the run `data`; the same run gives the same text.

    Of files on this machine only the name is told.
    """
    model = next((model for model in data.models if model.name == result.model), None)
    written = yaml.safe_load(data.config) if data.config else {}
    config = _without_folders(written)
    source = _source(config, result.model)
    parts = [
        _head(_source(written, result.model)),
        f"# {result.model}, {result.label}",
        _what(result, source, model),
        *_use(model),
        "## Results\n\n" + _results(data, result),
        "## Where the bits went\n\n" + (_bits(model.allocations.get(result.label, ())) if model else _NOT_MEASURED),
        *([_warnings(model)] if model and model.warnings else []),
        "## How to make it again\n\n" + _reproduction(data, config, model),
    ]
    return "\n\n".join(parts) + "\n"


_NOT_MEASURED = "Not measured."

_USE = """## Use

```python
import lmq  # teaches transformers to open lmq checkpoints
from transformers import {0}, {2}

model = {0}.from_pretrained(PATH)  # or lmq.load(PATH, dense=True): unpacked once, faster
{1} = {2}.from_pretrained(PATH)
```"""

_EXPORT = "`lmq export PATH --format safetensors | hqq | gguf | compressed-tensors` writes it for other programs."


def _use(model: ModelReport | None) -> list[str]:
    """How the checkpoint is opened, and written for other programs where these know such models."""
    if model is not None and model.structure.sees_images:
        return [_USE.format(LOSSES[model.structure.loss].auto_class, "processor", "AutoImageProcessor")]
    if model is not None and model.structure.parts_beside:
        return [_USE.format("AutoModelForImageTextToText", "processor", "AutoProcessor"), _EXPORT]
    return [_USE.format("AutoModelForCausalLM", "tokenizer", "AutoTokenizer"), _EXPORT]


def _source(config: Mapping[str, Any], model: str) -> str | None:
    return next((item["source"] for item in config.get("models", ()) if item["name"] == model), None)


def _head(source: str | None) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "tags": ["lmq", "quantized"]}
    if source is not None and (parsed := ModelSource.parse(source)).kind == "hub":
        fields = {"base_model": parsed.place, "base_model_relation": "quantized", **fields}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _what(result: VariantResult, source: str | None, model: ModelReport | None) -> str:
    notes = model.structure.kept_notes if model else []
    kept = f"; so are, in the blocks, {', '.join(notes)}" if notes else ""
    if model and model.structure.kept_parts:
        kept += f"; so are, beside the language model, {', '.join(model.structure.kept_beside)}"
    return (
        f"`{source or result.model}` with its weight matrices quantized by lmq: strategy "
        f"`{result.strategy}`, {format_number(result.bits_per_weight, 3)} bits per weight. "
        f"The matrices take {format_bytes(result.size_bytes)} of {format_bytes(result.checkpoint_bytes)} on disk; "
        f"embeddings, head and norms are as in the source{kept}."
    )


def _results(data: ReportData, result: VariantResult) -> str:
    own = [other for other in data.results if other.model == result.model]
    uniform = next((other for other in own if other.strategy == UNIFORM and other.budget == result.budget), None)
    rows = [row for row in (full_precision_of(result.model, own), uniform, result) if row is not None]
    shown = list({row.label: row for row in rows}.values())
    table = _table(
        ("Variant", "Bits per weight", "Matrices", "Perplexity", "KL, mean", "KL, 99 %", "Same top-1"),
        [
            (
                row.label,
                format_number(row.bits_per_weight, 3),
                format_bytes(row.size_bytes),
                format_measured(row.perplexity, row.perplexity_stderr),
                format_measured(row.kl_divergence, row.kl_divergence_stderr, decimals=4),
                format_number(row.kl_p99, 3),
                format_percent(row.top1_agreement),
            )
            for row in shown
        ],
    )
    judged = (
        f"{result.protocol}, {format_number(result.tokens, 0)} tokens scored" if result.protocol else "not evaluated"
    )
    return (
        f"{table}\n\nPerplexity: {judged}; the text is named below. ± is one standard error over windows. "
        "KL divergence is to full precision, in nats per token. “–” means not measured."
    )


def _bits(rows: Rows) -> str:
    if not rows:
        return _NOT_MEASURED
    by_kind: dict[str, Counter[QuantSpec]] = defaultdict(Counter)
    for row in rows:
        by_kind[without_number(row["kind"])][QuantSpec.from_row(row)] += 1
    specs = sorted({spec for counts in by_kind.values() for spec in counts})
    table = [(kind, *(str(counts[spec] or "") for spec in specs)) for kind, counts in by_kind.items()]
    return "Matrices by configuration (`b4g64`: 4 bits, groups of 64):\n\n" + _table(
        ("Kind", *(spec.name for spec in specs)), table
    )


def _warnings(model: ModelReport) -> str:
    return "## Mind\n\n" + "\n".join(f"- {warning}" for warning in model.warnings)


def _reproduction(data: ReportData, config: Mapping[str, Any], model: ModelReport | None) -> str:
    digest = f"Source weights: sha256 `{model.structure.weights_sha256}`.\n\n" if model else ""
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items()) or "unknown versions"
    text = yaml.safe_dump(config, sort_keys=False).rstrip()
    return (
        f"{digest}`lmq run` of this configuration (run `{data.run}`) made the checkpoint, with {versions}:"
        f"\n\n```yaml\n{text}\n```"
    )


def _without_folders(value: Any) -> Any:
    """The configuration with absolute paths cut to their names."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ("---", *("---:" for _ in headers[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, rule, *rows))
