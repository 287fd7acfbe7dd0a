"""Evaluation texts that quantization papers use, by short names, from the hub through `datasets`.

`wikitext2` is the test split of WikiText-2 as it is written (raw), `c4` the first 1,100 documents of C4's validation
split, `ptb` the test split of the Penn Treebank in the form language models are judged on (lower case, <unk>).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from lmq.errors import InputError


@dataclass(frozen=True, kw_only=True)
class KnownText:
    """A data set of the hub: arguments of `datasets.load_dataset`, its column, and how many rows are taken."""

    name: str
    column: str
    split: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None


KNOWN_TEXTS: Mapping[str, KnownText] = {
    "wikitext2": KnownText(
        name="Salesforce/wikitext", column="text", split="test", options={"name": "wikitext-2-raw-v1"}
    ),
    "c4": KnownText(
        name="allenai/c4",
        column="text",
        split="validation",
        options={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        rows=1100,
    ),
    "ptb": KnownText(
        name="ptb-text-only/ptb_text_only",
        column="sentence",
        split="test",
        # the hub's own conversion: the data set itself is a program, which `datasets` no longer runs
        options={"revision": "refs/convert/parquet", "data_files": {"test": "penn_treebank/test/*.parquet"}},
    ),
}


def read_known_text(name: str) -> list[str]:
    """Documents of one of `KNOWN_TEXTS`, in order. Raises InputError where it is not here and cannot be fetched."""
    # datasets takes seconds to import, which only this function needs
    import datasets

    known = KNOWN_TEXTS[name]
    try:
        rows = datasets.load_dataset(known.name, split=known.split, **known.options)
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the text {name} ({known.name}) could not be fetched from the hub ({reason}); fetch it once with a "
            "network, or pass a text, .jsonl or .parquet file instead"
        ) from error
    count = len(rows) if known.rows is None else min(known.rows, len(rows))
    return [rows[index][known.column] for index in range(count)]
