"""Evaluation texts that quantization papers use, by short names, from the hub through `datasets`.

`wikitext2` is the test split of WikiText-2 as it is written (raw), `c4` the first 1,100 documents of C4's validation
split, `ptb` the test split of the Penn Treebank in the form language models are judged on (lower case, <unk>).

WikiText-2 and C4 are read at fixed commits, so that a name means one content everywhere and always, without asking the
hub. The Penn Treebank is on a branch that the hub itself made, of which no commit is fixed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmq.errors import InputError
from lmq.text.data_sets import load_errors, load_failure, require_commit


@dataclass(frozen=True, kw_only=True)
class KnownText:
    """A data set of the hub: arguments of `datasets.load_dataset`, its column, and how many rows are taken."""

    name: str
    revision: str
    column: str
    split: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether its revision is a commit, and so its content one and the same."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


KNOWN_TEXTS: Mapping[str, KnownText] = {
    "wikitext2": KnownText(
        name="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        column="text",
        split="test",
        options={"name": "wikitext-2-raw-v1"},
    ),
    "c4": KnownText(
        name="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        column="text",
        split="validation",
        options={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        rows=1100,
    ),
    "ptb": KnownText(
        name="ptb-text-only/ptb_text_only",
        # the hub's own conversion: the data set itself is a program, which `datasets` no longer runs
        revision="refs/convert/parquet",
        column="sentence",
        split="test",
        options={"data_files": {"test": "penn_treebank/test/*.parquet"}},
    ),
}


def known_text_identity(name: str) -> str:
    """What one of `KNOWN_TEXTS` is known by: its name, with the commit where that is fixed."""
    known = KNOWN_TEXTS[name]
    return f"{name}@{known.revision}" if known.is_fixed else name


def known_text_note(name: str) -> str:
    """What a person should know of one of `KNOWN_TEXTS`: which content its name means."""
    known = KNOWN_TEXTS[name]
    place = f"{known.name}@{known.revision}"
    return f"{name} is {place}" + ("" if known.is_fixed else ", known by its name alone: a branch, read as it is now")


def read_known_text(name: str) -> list[str]:
    """Documents of one of `KNOWN_TEXTS`, in order. Raises InputError where it is not here and cannot be fetched."""
    # datasets takes seconds to import, which only this function needs
    import datasets

    known = KNOWN_TEXTS[name]
    try:
        rows = datasets.load_dataset(known.name, split=known.split, revision=known.revision, **known.options)
    except load_errors() as error:
        raise InputError(
            f"the text {name} ({known.name}) could not be fetched from the hub ({load_failure(error)}); fetch it "
            "once with a network, or pass a text, .jsonl or .parquet file instead"
        ) from error
    require_commit(rows, known.revision, f"the text {name} ({known.name})")
    count = len(rows) if known.rows is None else min(known.rows, len(rows))
    return [rows[index][known.column] for index in range(count)]
