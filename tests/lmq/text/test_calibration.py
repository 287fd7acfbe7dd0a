import bz2
import gzip
import json
import lzma
import pydoc_data.topics
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmq.errors import DamagedFile, InputError
from lmq.text.calibration import (
    TextSource,
    documents,
    load_tokenizer,
    pack_tokens,
    read_tokens,
    text_prefix,
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
        ("column.jsonl", b'{"body": "a", "id": 1}', "all", r"no column 'text' \(it has: body, id\)"),
        ("list.jsonl", b"[1]", "all", r"list\.jsonl holds no text \(1 list\)"),
        ("broken.parquet", b"PAR1", "all", "is not a readable Parquet file"),
        ("text.pdf", b"%PDF", "all", "is not a text file that lmq reads; pass a .txt, .jsonl or .parquet file"),
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


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="unknown part of a text 'frist'; did you mean 'first'"):
        TextSource(part="frist")


def test_bos_is_found_from_what_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert text_prefix(tokenizer) == []
    assert text_prefix(bos_tokenizer) == [0]


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


ROWS = ["one text", None, 7, "", "another \ud800 text", 2.5]
LEFT = ["one text", "", "another � text"]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "ROWS.JSONL", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.ndjson.xz"]
)
def test_rows_without_text_are_left_out_and_counted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """JSON with a byte order mark, of every suffix and compression; half a surrogate pair is replaced."""
    records = [{"id": number, "text": value} for number, value in enumerate(ROWS)] + [{"id": 6}]
    lines = json.dumps(records) if name == "rows.json" else "".join(json.dumps(record) + "\r\n" for record in records)
    path = tmp_path / name
    path.write_bytes(_compressed(lines.encode("utf-8-sig"), path.suffix))
    assert documents(TextSource(source=str(path))) == LEFT
    assert "4 of 7 rows" in caplog.text
    assert "2 null" in caplog.text


def _compressed(content: bytes, suffix: str) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(content)
        case ".xz":
            return lzma.compress(content)
        case ".zst":
            return pa.compress(content, codec="zstd", asbytes=True)
    return content


@pytest.mark.parametrize("name", ["Wiki.TXT", "wiki.raw.gz", "wiki.zst", "README.MD", "wiki.txt.bz2"])
def test_plain_text_is_read_by_any_suffix_and_compression(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = "\ufeffone\n\ntwo".encode()
    path.write_bytes(bz2.compress(content) if path.suffix == ".bz2" else _compressed(content, path.suffix))
    assert documents(TextSource(source=str(path))) == ["one\n\ntwo"]


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()], ids=str)
def test_text_of_every_arrow_type_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    column = (
        pa.array(["a", None, "b", "a"]).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(["a", None, "b", "a"], type=kind)
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "texts.parquet")
    assert documents(TextSource(source=str(tmp_path / "texts.parquet"))) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jsonl.gz", b"no gzip"),
        ("text.txt.zst", b"no zstd"),
        ("text.json", b'{"text": '),
        ("text.md.xz", b"no xz"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} (cannot be read|is not JSON)"):
        documents(TextSource(source=str(tmp_path / name)))


CHAT = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
]


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.parquet", "shared.json"])
def test_conversations_are_written_out_by_the_chat_template(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / name
    if name == "chat.parquet":
        pq.write_table(pa.table({"messages": CHAT}), path)
    elif name == "chat.jsonl":
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHAT))
    else:
        speakers = {"user": "human", "assistant": "gpt", "system": "system"}
        shared = [[{"from": speakers[m["role"]], "value": m["content"]} for m in messages] for messages in CHAT]
        path.write_text(json.dumps([{"conversations": messages} for messages in shared]))
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(InputError, match="holds conversations, and the model's tokenizer has no chat template"):
        documents(TextSource(source=str(path)), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    expected = ["<user>Who?\n<assistant>Me.\n", "<system>Be brief.\n<user>Where?\n"]
    assert documents(TextSource(source=str(path)), tokenizer) == expected
    assert documents(TextSource(source=str(path), column="messages"), tokenizer) == expected


@pytest.mark.parametrize(
    ("single", "prefix"),
    [("<eos> $A", [1]), ("<bos> <eos> <bos> $A", [0, 1, 0]), ("$A <eos>", []), ("<eos> <bos> $A <eos>", [1, 0])],
)
def test_the_prefix_is_what_the_tokenizer_puts_in_front(single: str, prefix: list[int], tiny_llama: Path) -> None:
    """One token that is not bos_token, several, none but one behind, and both."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert text_prefix(tokenizer) == prefix
    blocks = pack_tokens(documents(TextSource()), tokenizer, sequence_length=12, sequences=3)
    assert blocks.shape == (3, 12)
    assert blocks[:, : len(prefix)].tolist() == [prefix] * 3
    with pytest.raises(InputError, match="sequence_length = 0 leaves no room"):
        pack_tokens(["a text"], tokenizer, sequence_length=0, sequences=1)
