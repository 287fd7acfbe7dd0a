import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmq.errors import InputError
from lmq.text.calibration import TextSource, documents, load_tokenizer
from lmq.text.data_sets import DataSet, identify_data_set
from lmq.text.known_texts import KNOWN_TEXTS, KnownText


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), path)


def _more_columns(folder: Path) -> None:
    _lines(folder / "a.jsonl", {"text": "a"})
    _lines(folder / "b.jsonl", {"text": "b", "source": "b", "n": 1})


def _more_columns_in_parquet(folder: Path) -> None:
    _parquet(folder / "a.parquet", text=["a"])
    _parquet(folder / "b.parquet", text=["b"], n=[1])


def _fewer_columns(folder: Path) -> None:
    (folder / "a.csv").write_text("text,n\na,1\n")
    (folder / "b.csv").write_text("text\nb\n")


def _other_columns(folder: Path) -> None:
    (folder / "a.csv").write_text("text\na\n")
    (folder / "b.csv").write_text("body\nb\n")


def _other_type(folder: Path) -> None:
    _parquet(folder / "a.parquet", text=["a"])
    _parquet(folder / "b.parquet", text=[[1]])


def _program(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text("raise SystemExit('a data set script')\n")


def _truncated_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')


def _truncated_parquet(folder: Path) -> None:
    _parquet(folder / "a.parquet", text=["a"])
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9])


def _damaged_archive(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-6])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_more_columns, r"cannot be read \(its files differ in their columns: one has source, n, unlike the first\)"),
        (_more_columns_in_parquet, "differ in their columns: one has n, unlike the first"),
        (_fewer_columns, r"Schema at index 1 was different: text: \w+ n: int64 vs text: \w+\)"),
        (_other_columns, r"different: text: \w+ vs body: \w+\)"),
        (_other_type, r"Couldn't cast array of type list<element: int64> to string"),
        (_program, "scripts are no longer supported"),
        (_truncated_lines, "JSON parse error"),
        (_truncated_parquet, "[Pp]arquet"),
        (_damaged_archive, r"cannot be read \(.*[Cc]ompressed file ended"),
        (lambda folder: None, "doesn't contain any data files"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_message(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    with pytest.raises(InputError, match=message) as refused:
        documents(TextSource(source=f"dataset:{folder}"))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(
        "; pass a .txt, .jsonl or .parquet file, wikitext2, c4, ptb or pydoc-topics instead"
    )


def test_a_column_of_numbers_a_missing_column_and_a_missing_split_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _parquet(folder / "a.parquet", text=[1, 2, 3])
    with pytest.raises(InputError, match=r"column 'text' of dataset:.* holds no text \(3 int\)"):
        documents(TextSource(source=f"dataset:{folder}"))
    with pytest.raises(InputError, match=r"has no column 'body' \(it has: text\)"):
        documents(TextSource(source=f"dataset:{folder}", column="body"))
    with pytest.raises(InputError, match='Unknown split "test"'):
        documents(TextSource(source=f"dataset:{folder}:test"))


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ["one", None, 7, "two", {"a": 1}, None, "three"]
    _lines(tmp_path / "train.jsonl", *({"text": value} for value in rows))
    assert documents(TextSource(source=f"dataset:{tmp_path}")) == ["one", "two", "three"]
    assert "4 of 7 rows" in caplog.text
    assert "2 null" in caplog.text


def test_conversations_are_written_out_by_the_chat_template(tmp_path: Path, tiny_llama: Path) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    _lines(tmp_path / "train.jsonl", {"messages": messages})
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert documents(TextSource(source=f"dataset:{tmp_path}"), tokenizer) == ["<user>Who?<assistant>Me."]


def test_a_data_set_that_cannot_be_fetched_says_what_to_pass_instead() -> None:
    with pytest.raises(InputError, match=r"could not be fetched .* pass a \.txt, \.jsonl or \.parquet file"):
        documents(TextSource(source="dataset:no-such/data/config:test"))
    with pytest.raises(InputError, match=r"write dataset:ORG/NAME\[@REVISION\]\[/CONFIG\]\[:SPLIT\]"):
        documents(TextSource(source="dataset:a b"))


def _folder(place: Path, *texts: str) -> Path:
    place.mkdir(exist_ok=True)
    (place / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    """Another place with the same files has the same identity; any other byte, or file, has another."""
    first, _ = identify_data_set(f"dataset:{_folder(tmp_path / 'a', 'one')}")
    same, source = identify_data_set(f"dataset:{_folder(tmp_path / 'b', 'one')}:train")
    assert first == same
    assert source == f"dataset:{tmp_path / 'b'}:train"
    other, _ = identify_data_set(f"dataset:{_folder(tmp_path / 'b', 'two')}")
    (tmp_path / "a" / "more.jsonl").write_text("")
    more, _ = identify_data_set(f"dataset:{tmp_path / 'a'}")
    test, _ = identify_data_set(f"dataset:{tmp_path / 'b'}:test")
    assert len({first, other, more, test}) == 4


def test_a_data_set_of_the_hub_is_known_and_read_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str | None, str | None]] = []

    def builder(name: str, config: str | None, revision: str | None) -> SimpleNamespace:
        asked.append((name, config, revision))
        return SimpleNamespace(hash="ab" * 20)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    identity, source = identify_data_set("dataset:org/name@v2/small:test")
    assert asked == [("org/name", "small", "v2")]
    assert identity == f"dataset@{'ab' * 20}:org/name/small:test"
    assert source == f"dataset:org/name@{'ab' * 20}/small:test"
    assert DataSet.parse(source) == DataSet(name="org/name", config="small", split="test", revision="ab" * 20)


def _copy_of_commit(cache: Path, name: str, commit: str, text: str) -> None:
    """Put a data set of the hub into the cache of `datasets`, as one that was fetched at a commit."""
    import datasets

    source = cache.parent / f"{commit}.jsonl"
    _lines(source, {"text": text})
    made = cache.parent / f"made-{commit}"
    datasets.load_dataset("json", data_files=str(source), cache_dir=str(made))
    (info,) = made.rglob("dataset_info.json")
    organisation, _, short = name.partition("/")
    target = cache / f"{organisation}___{short}" / "default" / "0.0.0" / commit
    target.mkdir(parents=True)
    described = json.loads(info.read_text()) | {"builder_name": "json", "dataset_name": short, "config_name": "default"}
    described["splits"]["train"]["dataset_name"] = short
    (target / "dataset_info.json").write_text(json.dumps(described))
    shutil.copy(info.parent / "json-train.arrow", target / f"{short}-train.arrow")


def test_a_copy_of_another_commit_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    """The tests run with the hub switched off, where `datasets` gives the copy that is there."""
    _copy_of_commit(tmp_path / "cache", "org/tiny", "ab" * 20, "one")
    identity, source = identify_data_set("dataset:org/tiny")
    assert identity == f"dataset@{'ab' * 20}:org/tiny/default:train"
    assert documents(TextSource(source=source)) == ["one"]
    with pytest.raises(InputError, match=f"at commit {'ab' * 20}, not at {'cd' * 20}; fetch it once with a network"):
        documents(TextSource(source=f"dataset:org/tiny@{'cd' * 20}"))


def test_known_texts_of_another_commit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _copy_of_commit(tmp_path / "cache", "org/tiny", "ab" * 20, "one")
    here = KnownText(name="org/tiny", revision="ab" * 20, column="text", split="train")
    monkeypatch.setitem(KNOWN_TEXTS, "wikitext2", here)
    assert documents(TextSource(source="wikitext2")) == ["one"]
    monkeypatch.setitem(KNOWN_TEXTS, "wikitext2", replace(here, revision="cd" * 20))
    with pytest.raises(InputError, match=r"the text wikitext2 \(org/tiny\) is on this machine at commit abab"):
        documents(TextSource(source="wikitext2"))
    monkeypatch.setitem(KNOWN_TEXTS, "wikitext2", replace(here, revision="refs/convert/parquet"))
    assert documents(TextSource(source="wikitext2")) == ["one"]
