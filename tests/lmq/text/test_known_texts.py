from typing import Any

import datasets
import pytest

from lmq.errors import InputError
from lmq.text.calibration import TextSource, documents, is_file_text
from lmq.text.known_texts import KNOWN_TEXTS

ASKED = {
    "wikitext2": (
        "Salesforce/wikitext",
        {"name": "wikitext-2-raw-v1", "split": "test", "revision": "b08601e04326c79dfdd32d625aee71d232d685c3"},
    ),
    "c4": (
        "allenai/c4",
        {
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
            "revision": "607bd4c8450a42878aa9ddc051a65a055450ef87",
        },
    ),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        {
            "revision": "refs/convert/parquet",
            "data_files": {"test": "penn_treebank/test/*.parquet"},
            "split": "test",
        },
    ),
}


@pytest.mark.parametrize("name", KNOWN_TEXTS)
def test_short_names_ask_the_hub_for_what_papers_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"document {number}" for number in range(1200)]
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(place: str, **options: Any) -> datasets.Dataset:
        asked.append((place, options))
        return datasets.Dataset.from_dict({KNOWN_TEXTS[name].column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = documents(TextSource(source=name))
    assert asked == [ASKED[name]]
    assert found == (rows[:1100] if name == "c4" else rows)


def test_what_cannot_be_fetched_is_told() -> None:
    """The tests run with the hub switched off."""
    with pytest.raises(InputError, match=r"the text wikitext2 \(Salesforce/wikitext\) could not be fetched"):
        documents(TextSource(source="wikitext2"))


def test_a_name_that_is_nearly_known() -> None:
    with pytest.raises(InputError, match="unknown text 'wikitext'; did you mean 'wikitext2'"):
        documents(TextSource(source="wikitext"))


def test_what_is_a_file() -> None:
    assert is_file_text("wiki.test.raw")
    assert is_file_text("notes")
    assert not any(is_file_text(name) for name in (*KNOWN_TEXTS, "pydoc-topics", "dataset:a/b"))
