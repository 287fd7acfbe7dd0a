import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq_storage import (
    ArtifactRef,
    ArtifactStore,
    DamagedArtifact,
    StoreError,
    artifact_key,
    canonical_json,
    check_record,
    checked_files,
)
from lmq_storage.check_record import CheckRecord
from lmq_storage.verify import verify


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"memory://{tmp_path.name}", cache_dir=tmp_path / "cache")


def publish(store, key="k", text="hello", stage="kurtosis", **options):
    with store.workspace() as folder:
        (folder / "a.txt").write_text(text)
        files = {"a.txt": folder / "a.txt"}
        return store.publish(
            stage=stage, key=key, schema="text/1", files=files, algorithm_version=1, seconds=1.5, **options
        )


def blob_of(store, ref):
    return store.path(ref, "a.txt")


def test_published_artifact_is_found_with_its_bytes(store):
    ref = publish(store, config={"layer": 3})
    assert store.find("kurtosis", "k") == ref
    assert store.path(ref, "a.txt").read_text() == "hello"
    manifest = store.manifest("kurtosis", "k")
    assert (manifest.config, manifest.seconds, manifest.size_bytes) == ({"layer": 3}, 1.5, 5)
    assert ArtifactRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
    assert (ref.stage, ref.key) == ("kurtosis", "k")


def test_unknown_artifact_is_a_miss(store):
    assert store.find("kurtosis", "nothing") is None
    with pytest.raises(DamagedArtifact, match="kurtosis/nothing is gone"):
        store.path(ArtifactRef("kurtosis/nothing", "0" * 64, "text/1"), "a.txt")


def test_unknown_file_names_those_there_are(store):
    with pytest.raises(StoreError, match=r"has no file 'b\.txt'; it has a\.txt"):
        store.path(publish(store), "b.txt")


def test_first_publish_wins_and_content_decides_the_digest(store):
    first = publish(store, text="one")
    assert publish(store, text="two") == first
    assert store.path(first, "a.txt").read_text() == "one"
    assert publish(store, key="other", text="one").sha256 == first.sha256


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_damaged_bytes_are_a_miss_and_are_made_again(tmp_path, damage):
    store = ArtifactStore(str(tmp_path / "store"))
    blob = blob_of(store, publish(store))
    blob.chmod(0o644)
    if damage == "deleted":
        blob.unlink()
    else:
        blob.write_text("hell" if damage == "truncated" else "hallo")
    assert store.find("kurtosis", "k") is None
    assert len(verify(store)) == 1
    assert "kurtosis/k file a.txt" in verify(store)[0]
    again = publish(store)
    assert store.path(again, "a.txt").read_text() == "hello"
    assert verify(store) == []


def test_bytes_that_were_read_once_are_there_without_being_read(tmp_path, monkeypatch):
    ref = publish(ArtifactStore(str(tmp_path / "store")))
    monkeypatch.setattr(checked_files, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert ArtifactStore(str(tmp_path / "store")).find("kurtosis", "k") == ref


@pytest.mark.parametrize("noticed_by", ["reading", "verify"])
def test_bytes_that_rot_unseen_are_noticed_before_they_are_worked_with(tmp_path, noticed_by):
    store, other = (ArtifactStore(str(tmp_path / "store")) for _ in range(2))
    ref = publish(store)
    blob = blob_of(store, ref)
    before = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as stream:
        stream.write(b"j")
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert other.find("kurtosis", "k") == ref
    if noticed_by == "verify":
        assert len(verify(ArtifactStore(str(tmp_path / "store")))) == 1
    else:
        with pytest.raises(DamagedArtifact, match="missing or damaged"):
            ArtifactStore(str(tmp_path / "store")).path(ref, "a.txt")
    assert other.find("kurtosis", "k") is None
    publish(other)
    assert ArtifactStore(str(tmp_path / "store")).path(ref, "a.txt").read_text() == "hello"


def test_the_record_of_checks_is_read_as_far_as_it_makes_sense(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    ref = publish(store)
    (tmp_path / "store" / "checked").write_bytes(b"\xff half a line\n" + b"one two three\nhalf")
    assert ArtifactStore(str(tmp_path / "store")).find("kurtosis", "k") == ref


def test_the_record_of_checks_is_rewritten_when_most_of_its_lines_are_old(tmp_path, monkeypatch):
    monkeypatch.setattr(check_record, "_LINES_BEFORE_REWRITE", 5)
    record, blob = CheckRecord(tmp_path / "checked"), tmp_path / "blob"
    blob.write_text("hello")
    for _ in range(20):
        record.add(blob)
    assert record.holds(blob)
    assert len((tmp_path / "checked").read_text().splitlines()) == 1
    assert CheckRecord(tmp_path / "checked").holds(blob)
    record.drop(blob)
    assert not record.holds(blob)
    assert not CheckRecord(tmp_path / "checked").holds(blob)


def test_truncated_manifest_is_a_miss(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    publish(store)
    manifest = tmp_path / "store" / "manifests" / "kurtosis" / "k.json"
    manifest.write_text(manifest.read_text()[:40])
    assert store.find("kurtosis", "k") is None
    assert store.find("kurtosis", publish(store).key) is not None


def test_missing_remote_blob_is_a_miss(tmp_path):
    store = ArtifactStore(f"memory://{tmp_path.name}", cache_dir=tmp_path / "cache")
    publish(store)
    for path in store.storage.find("blobs"):
        store.storage.remove(path)
    assert store.find("kurtosis", "k") is None


def test_nothing_is_left_when_the_writer_fails(store):
    folders = []

    def fail():
        with store.workspace() as folder:
            folders.append(folder)
            (folder / "a.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(store.manifests()) == []
    assert not folders[0].exists()


def test_materialize_lays_files_out_and_replaces(store, tmp_path):
    with store.workspace() as folder:
        (folder / "big.bin").write_bytes(os.urandom(2 << 20))
        (folder / "small.txt").write_text("s")
        files = {"big.bin": folder / "big.bin", "sub/small.txt": folder / "small.txt"}
        ref = store.publish(stage="checkpoint", key="c", schema="directory/1", files=files, algorithm_version=1)
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_text("x")
    store.materialize(ref, target)
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == [
        "big.bin",
        "sub/small.txt",
    ]


def test_files_lie_beside_an_artifact_until_they_change(store, tmp_path):
    with store.workspace() as folder:
        (folder / "a.txt").write_text("a")
        ref = store.publish(
            stage="checkpoint", key="c", schema="directory/1", files={"a.txt": folder / "a.txt"}, algorithm_version=1
        )
    card, target = tmp_path / "card", tmp_path / "out"
    card.write_text("first")
    store.materialize(ref, target, beside={"README.md": card})
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a.txt": "a", "README.md": "first"}
    made = target.stat().st_ino
    store.materialize(ref, target, beside={"README.md": card})
    assert target.stat().st_ino == made
    card.write_text("second")
    store.materialize(ref, target, beside={"README.md": card})
    assert (target / "README.md").read_text() == "second"
    store.materialize(ref, target)
    assert [path.name for path in target.iterdir()] == ["a.txt"]
    assert verify(store) == []


@pytest.mark.parametrize("repetition", range(20))
def test_many_writers_of_one_key_agree(tmp_path, repetition):
    store_url = str(tmp_path / "store")
    refs = []

    def write(number):
        refs.append(publish(ArtifactStore(store_url), text=f"by {number}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(refs)) == 1
    assert verify(ArtifactStore(store_url)) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_key_ignores_the_order_of_entries(config):
    backwards = dict(reversed(list(config.items())))
    assert artifact_key("s", 1, config, {}) == artifact_key("s", 1, backwards, {})
    assert json.loads(canonical_json(config)) == config


def test_every_part_of_a_key_counts():
    keys = {
        artifact_key("a", 1, {"x": 1}, {"i": "d"}),
        artifact_key("b", 1, {"x": 1}, {"i": "d"}),
        artifact_key("a", 2, {"x": 1}, {"i": "d"}),
        artifact_key("a", 1, {"x": 2}, {"i": "d"}),
        artifact_key("a", 1, {"x": 1}, {"i": "e"}),
        artifact_key("a", 1, {"x": 1}, {"i": ["d"]}),
    }
    assert len(keys) == 6


PREVIOUS_MANIFEST = """{
 "algorithm_version": 1, "config": {"layer": 3}, "files": {"a.txt": {
  "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "size_bytes": 5}},
 "host": "old", "inputs": {}, "key": "k", "manifest_version": 1, "schema": "text/1", "seconds": 1.5,
 "stage": "kurtosis", "versions": {"lmq": "0.1.0"}
}"""
"""As the store wrote it before peak memory was noted: manifests outlive the code that wrote them."""


def test_an_artifact_of_a_previous_version_is_found(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    store.storage.write("blobs/2c/2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", b"hello")
    store.storage.write("manifests/kurtosis/k.json", PREVIOUS_MANIFEST.encode())
    ref = store.find("kurtosis", "k")
    assert store.path(ref, "a.txt").read_text() == "hello"
    assert publish(store, text="other") == ref
    assert verify(store) == []


def test_a_field_that_is_not_known_here_is_a_miss(tmp_path):
    """A later version that wrote more without raising the manifest's version is not half understood."""
    store = ArtifactStore(str(tmp_path / "store"))
    ref = publish(store)
    text = store.storage.read("manifests/kurtosis/k.json").decode()
    store.storage.write("manifests/kurtosis/k.json", text.replace("{", '{"later": 1,', 1).encode())
    assert store.find("kurtosis", "k") is None
    assert publish(store) == ref
