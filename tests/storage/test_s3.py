"""The store on S3: a moto server behind a proxy that throttles, drops connections and hides fresh objects."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import uuid

import fsspec
import pytest
import s3fs

from lmq_storage import ArtifactStore, BadStore, DamagedArtifact, StoreError, retry
from lmq_storage.housekeeping import collect_garbage, list_contents
from lmq_storage.leases import Lease
from lmq_storage.verify import verify

MEGABYTE = 1 << 20


@pytest.fixture
def url(s3):
    fsspec.filesystem("s3").clear_instance_cache()  # each test has the settings of its own environment
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def quick(monkeypatch):
    """Waits a thousandth as long; as many attempts."""
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    return waited


def open_s3(url, tmp_path, name="cache"):
    return ArtifactStore(url, cache_dir=tmp_path / name)


def publish(store, key="k", content=b"hello", stage="kurtosis"):
    with store.workspace() as folder:
        (folder / "a").write_bytes(content)
        return store.publish(stage=stage, key=key, schema="x/1", files={"a": folder / "a"}, algorithm_version=1)


def test_what_one_machine_publishes_another_reads(url, tmp_path):
    ref = publish(open_s3(url, tmp_path, "one"))
    other = open_s3(url, tmp_path, "two")
    assert other.find("kurtosis", "k") == ref
    assert other.path(ref, "a").read_bytes() == b"hello"
    assert other.materialize(ref, tmp_path / "out").joinpath("a").read_bytes() == b"hello"
    assert verify(other) == []


def test_listings_are_not_remembered(url, tmp_path):
    one, two = open_s3(url, tmp_path, "one"), open_s3(url, tmp_path, "two")
    assert list(one.manifests()) == []
    ref = publish(two)
    assert [manifest.ref for manifest in one.manifests()] == [ref]
    two.storage.remove("manifests/kurtosis/k.json")
    assert one.find("kurtosis", "k") is None


@pytest.mark.parametrize(
    ("kind", "method", "path"),
    [
        ("slow down", "PUT", "/blobs/"),
        ("slow down", "PUT", "/manifests/"),
        ("drop upload", "PUT", "/blobs/"),
        ("lose answer", "PUT", "/blobs/"),
        ("lose answer", "PUT", "/manifests/"),
        ("slow down", "HEAD", "/blobs/"),
        ("slow down", "GET", "/manifests/"),
        ("drop download", "GET", "/blobs/"),
        ("drop download", "GET", "/manifests/"),
        ("slow down", "GET", "list-type=2"),
    ],
)
@pytest.mark.parametrize("helped", [True, False], ids=["with s3fs's own retries", "alone"])
def test_a_fault_that_passes_is_not_noticed(s3, url, tmp_path, quick, monkeypatch, helped, kind, method, path):
    """s3fs itself asks again at some faults, up to 5 times; where it does not, or gives up, the store does."""
    if not helped:
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    fault = s3.add(kind, method, path, times=2)
    content = os.urandom(MEGABYTE)
    ref = publish(open_s3(url, tmp_path), content=content)
    other = open_s3(url, tmp_path, "other")
    assert other.path(other.find("kurtosis", "k"), "a").read_bytes() == content
    assert [manifest.ref for manifest in other.manifests()] == [ref]
    assert fault.hit == 2
    assert helped or quick, "the store itself never had to ask again"


def test_upload_in_parts_survives_a_dropped_part(s3, url, tmp_path):
    fault = s3.add("drop upload", "PUT", "partNumber=2", times=2)
    content = os.urandom(101 * MEGABYTE)
    ref = publish(open_s3(url, tmp_path), content=content)
    assert fault.hit == 2
    assert open_s3(url, tmp_path, "other").path(ref, "a").read_bytes() == content


def test_a_storage_that_keeps_failing_is_given_up_with_one_message(s3, url, tmp_path, quick, caplog):
    store = open_s3(url, tmp_path)
    s3.add("slow down", "PUT", "/blobs/", times=10_000)
    with caplog.at_level(logging.WARNING), pytest.raises(StoreError, match=r"cannot write blobs/.*SlowDown.*6 times"):
        publish(store)
    assert len(quick) == retry.ATTEMPTS - 1
    assert all(later > earlier for earlier, later in itertools.pairwise(quick))
    assert len([record for record in caplog.records if "SlowDown" in record.message]) == retry.ATTEMPTS - 1
    s3.clear()
    assert store.find("kurtosis", "k") is None
    assert list(store.manifests()) == []


def test_a_dead_server_is_one_message(tmp_path, url, quick, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="run again when the storage answers"):
        open_s3(f"{url}/dead", tmp_path).find("kurtosis", "k")


@pytest.mark.parametrize("act", ["find", "publish", "manifests"])
def test_a_bucket_that_does_not_exist_is_said_at_once(s3, url, tmp_path, quick, act):
    store = open_s3("s3://no-such-bucket/lmq", tmp_path)
    acts = {
        "find": lambda: store.find("kurtosis", "k"),
        "publish": lambda: publish(store),
        "manifests": lambda: list(store.manifests()),
    }
    with pytest.raises(BadStore, match="There is no such bucket; make it, or set `store` to another"):
        acts[act]()
    assert quick == []


def test_missing_credentials_are_said_at_once(url, tmp_path, quick, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(BadStore, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_s3(url, tmp_path).find("kurtosis", "k")
    assert quick == []


def test_a_missing_object_is_a_miss_and_is_made_again(url, tmp_path):
    store = open_s3(url, tmp_path)
    publish(store)
    (blob,) = store.storage.find("blobs")
    store.storage.remove(blob)
    assert store.find("kurtosis", "k") is None
    assert ["kurtosis/k file a is missing" in line for line in verify(store)] == [True]
    assert store.find("kurtosis", publish(store).key) is not None
    assert verify(store) == []


def test_altered_bytes_of_the_same_size_are_found_removed_and_made_again(url, tmp_path):
    publish(open_s3(url, tmp_path))
    store = open_s3(url, tmp_path, "other")
    (blob,) = store.storage.find("blobs")
    store.storage.write(blob, b"hallo")
    assert ["other bytes than were published" in line for line in verify(store)] == [True]
    ref = store.find("kurtosis", "k")
    with pytest.raises(DamagedArtifact, match="was damaged in s3://"):
        store.path(ref, "a")
    assert store.find("kurtosis", "k") is None
    assert store.path(publish(store), "a").read_bytes() == b"hello"


def test_a_listing_that_omits_fresh_objects_loses_nothing(s3, url, tmp_path):
    """Keys are looked up by name, never by listing; what a run in progress named is kept by its lease."""
    store = open_s3(url, tmp_path)
    with Lease(store, "night") as lease:
        old, fresh = publish(store, key="old", content=b"old"), publish(store, key="fresh", content=b"fresh")
        lease.use([old.uri, fresh.uri])
        s3.unlisted = "manifests/kurtosis/fresh"
        assert [manifest.key for manifest in store.manifests()] == ["old"]
        assert store.find("kurtosis", "fresh") == fresh
        garbage = collect_garbage(store, keep_runs=0, keep_hours=0, dry_run=False)
        assert garbage.uris == ()
    s3.unlisted = None
    assert open_s3(url, tmp_path, "other").path(fresh, "a").read_bytes() == b"fresh"
    assert verify(store) == []


WRITER = """
import sys, threading
from pathlib import Path
from lmq_storage import ArtifactStore
url, cache, text, start = sys.argv[1:]
store = ArtifactStore(url, cache_dir=Path(cache))
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    with store.workspace() as folder:
        (folder / "a").write_text(f"{text} {number}")
        ref = store.publish(stage="s", key=f"k{number}", schema="x/1", files={"a": folder / "a"}, algorithm_version=1)
    print(ref.sha256, store.path(ref, "a").read_text(), flush=True)
"""


def test_two_processes_publish_the_same_keys_and_agree_on_the_first(url, tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(tmp_path / name), name, ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = [writer.communicate(timeout=120)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20
    assert verify(open_s3(url, tmp_path)) == []


def test_many_threads_agree_on_the_first(url, tmp_path):
    refs = []
    barrier = threading.Barrier(6)

    def write(number):
        store = open_s3(url, tmp_path, f"cache{number}")
        barrier.wait()
        refs.append(publish(store, content=f"by {number}".encode()))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refs) == 6
    assert len(set(refs)) == 1


def test_a_damaged_manifest_is_replaced(url, tmp_path):
    store = open_s3(url, tmp_path)
    ref = publish(store)
    store.storage.write("manifests/kurtosis/k.json", b"{")
    assert store.find("kurtosis", "k") is None
    assert publish(store) == ref


def test_contents_and_garbage_of_a_bucket(url, tmp_path):
    store = open_s3(url, tmp_path)
    kept, gone = publish(store, key="kept", content=b"kept"), publish(store, key="gone", content=b"gone")
    store.write_text("runs/demo.json", f"{kept.uri}\n")
    contents = list_contents(store)
    assert [(item.run.name, item.run.state, item.total_bytes) for item in contents.runs] == [("demo", "finished", 4)]
    assert (contents.unneeded_artifacts, contents.unneeded_bytes) == (1, 4)
    assert collect_garbage(store, keep_runs=1, keep_hours=24, dry_run=False).uris == ()
    assert collect_garbage(store, keep_runs=1, keep_hours=0, dry_run=True).uris == (gone.uri,)
    assert collect_garbage(store, keep_runs=1, keep_hours=0, dry_run=False).freed_bytes == 4
    assert store.find("kurtosis", "gone") is None
    assert store.find("kurtosis", "kept") == kept
