import json
import pydoc_data.topics
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lmq.errors import DamagedFile, InputError
from lmq.text.calibration import (
    TextSource,
    bos_prefix,
    documents,
    load_tokenizer,
    pack_tokens,
    read_tokens,
    token_stream,
    tokens_fingerprint,
    write_tokens,
)

TEXTS = ["First document.", "Second document,\nwith two lines.", "", "Third document."]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="session")
def bos_tokenizer(tiny_gemma: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_gemma)


def test_every_python_has_the_default_text() -> None:
    found = documents(TextSource())
    assert len(found) == len(pydoc_data.topics.topics)
    assert sum(map(len, found)) > 300_000


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_records_are_documents(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    else:
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "body": TEXTS}), path)
    assert documents(TextSource(source=str(path), column="body")) == TEXTS


def test_a_text_file_is_one_document_and_its_paragraphs_make_parts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\nstill one\n\ntwo\n \n\nthree\n\nfour\n")
    assert documents(TextSource(source=str(path))) == [path.read_text()]
    parts = [documents(TextSource(source=str(path), part=part)) for part in ("first", "second")]
    assert sorted(parts[0] + parts[1]) == ["four\n", "one\nstill one", "three", "two"]
    assert [len(part) for part in parts] == [2, 2]


@given(seed=st.integers(0, 2**32))
def test_parts_share_no_document_and_leave_none_out(seed: int) -> None:
    first, second = (documents(TextSource(part=part, seed=seed)) for part in ("first", "second"))
    distinct = list(dict.fromkeys(documents(TextSource())))  # some topics are the same text under two names
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(distinct)
    assert abs(len(first) - len(second)) <= 1
    assert first == [text for text in distinct if text in set(first)]


def test_the_seed_decides_the_part() -> None:
    assert documents(TextSource(part="first", seed=1)) == documents(TextSource(part="first", seed=1))
    assert documents(TextSource(part="first", seed=1)) != documents(TextSource(part="first", seed=2))


@pytest.mark.parametrize(
    ("file", "content", "part", "message"),
    [
        ("empty.txt", b" \n\n ", "all", "holds no text"),
        ("latin.txt", b"caf\xe9", "all", "is not UTF-8 text"),
        ("single.txt", b"one paragraph", "first", "is one document, of which no part can be taken"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "all", r"broken\.jsonl line 2 is not JSON"),
        ("column.jsonl", b'{"body": "a", "id": 1}', "all", r"no text in column 'text' \(it has: body, id\)"),
        ("list.jsonl", b"[1]", "all", r"no text in column 'text' \(it has: list\)"),
        ("broken.parquet", b"PAR1", "all", "is not a readable Parquet file"),
        ("text.pdf", b"%PDF", "all", "is no text that lmq reads; pass a .txt, .jsonl or .parquet file"),
    ],
)
def test_files_that_are_no_text_are_refused(file: str, content: bytes, part: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents(TextSource(source=str(path), part=part))


def test_parquet_columns_that_are_missing_or_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", "b"]}), path)
    with pytest.raises(InputError, match=r"no column 'text' \(it has: id, body\)"):
        documents(TextSource(source=str(path)))
    with pytest.raises(InputError, match=r"column 'id' .* holds int64, not text"):
        documents(TextSource(source=str(path), column="id"))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(InputError, match=r"there is no file .*corpu\.txt; did you mean .*corpus\.txt\?"):
        documents(TextSource(source=str(tmp_path / "corpu.txt")))


def test_a_data_set_that_cannot_be_fetched_says_what_to_pass_instead() -> None:
    with pytest.raises(InputError, match=r"could not be fetched .* pass a \.txt, \.jsonl or \.parquet file"):
        documents(TextSource(source="dataset:no-such/data/config:test"))
    with pytest.raises(InputError, match=r"write dataset:ORG/NAME\[/CONFIG\]\[:SPLIT\]"):
        documents(TextSource(source="dataset:a b"))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="unknown part of a text 'frist'; did you mean 'first'"):
        TextSource(part="frist")


def test_bos_is_found_from_what_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert bos_prefix(tokenizer) is None
    assert bos_prefix(bos_tokenizer) == 0


def test_blocks_are_the_shuffled_text_in_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = documents(TextSource())
    blocks = pack_tokens(texts, tokenizer, sequence_length=32, sequences=5, seed=3)
    assert (blocks.shape, blocks.dtype) == ((5, 32), torch.int32)
    text = tokenizer.decode(blocks.flatten().tolist())
    start = next(document for document in texts if document.startswith(text[:40]))
    assert start.startswith(text)
    assert torch.equal(blocks, pack_tokens(texts, tokenizer, sequence_length=32, sequences=5, seed=3))
    assert not torch.equal(blocks, pack_tokens(texts, tokenizer, sequence_length=32, sequences=5, seed=4))


def test_every_block_begins_with_bos_where_the_model_needs_it(
    tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = documents(TextSource())
    blocks = pack_tokens(texts, bos_tokenizer, sequence_length=33, sequences=5)
    assert blocks.shape == (5, 33)
    assert (blocks[:, 0] == 0).all()
    assert torch.equal(blocks[:, 1:], pack_tokens(texts, tokenizer, sequence_length=32, sequences=5))


def test_too_short_a_text_says_how_much_is_there_and_how_much_is_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    there = len(tokenizer("short").input_ids)
    with pytest.raises(InputError, match=f"has {there} tokens where 4 sequences of 512 need 2,048"):
        pack_tokens(["short"], tokenizer, sequence_length=512, sequences=4)


@pytest.mark.parametrize("max_tokens", [1, 100, 5000, 10**9, None])
def test_a_stream_is_the_beginning_of_the_whole_text(
    max_tokens: int | None, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = documents(TextSource())[:6]
    whole = bos_tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False).input_ids
    stream = token_stream(texts, bos_tokenizer, max_tokens)
    assert stream.dtype == torch.int32
    assert stream.tolist() == whole[:max_tokens]


def test_tokens_are_kept_with_their_fingerprint(tmp_path: Path) -> None:
    tokens = torch.randint(0, 512, (3, 8), dtype=torch.int32)
    write_tokens(tmp_path / "tokens.parquet", tokens)
    found = read_tokens(tmp_path / "tokens.parquet")
    assert torch.equal(found, tokens)
    assert found.dtype == torch.int32
    assert tokens_fingerprint(found) == tokens_fingerprint(tokens.long())
    assert tokens_fingerprint(tokens.view(4, 6)) != tokens_fingerprint(tokens)
    (tmp_path / "tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedFile):
        read_tokens(tmp_path / "tokens.parquet")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer that can be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["wiki.test.raw", "notes", "readme.md"])
def test_plain_text_has_many_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one\n\ntwo\n\nthree")
    assert documents(TextSource(source=str(tmp_path / name))) == ["one\n\ntwo\n\nthree"]
    halves = [documents(TextSource(source=str(tmp_path / name), part=part)) for part in ("first", "second")]
    assert sorted([*halves[0], *halves[1]]) == ["one", "three", "two"]
