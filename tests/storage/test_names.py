import os
import tempfile

import pytest

from lmq_storage import ArtifactRef, ArtifactStore, BadStore, DamagedArtifact, StoreError
from lmq_storage.names import checked_file_name, checked_name, checked_url

BAD_PARTS = ["", "..", ".", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\0", "a\n", None, 3]


@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_name_of_one_part_cannot_leave_its_directory(name):
    with pytest.raises(StoreError, match="is not a valid name in a store"):
        checked_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a\\..\\b", "a//b", "a/./b", "a\0", None]
)
def test_a_file_of_an_artifact_cannot_leave_its_directory(name):
    with pytest.raises(StoreError, match="plain relative path"):
        checked_file_name(name)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/a b.txt", "..a", "checkpoint/x..y"])
def test_plain_file_names_are_taken(name):
    assert checked_file_name(name) == name


@pytest.mark.parametrize("uri", ["", "a", "../x/y", "a/../../x", "/etc/passwd", "a/b/c", "a/"])
def test_a_reference_cannot_leave_the_store(tmp_path, uri):
    with pytest.raises(DamagedArtifact):
        ArtifactRef.from_json({"uri": uri, "sha256": "0" * 64, "schema": "x/1"})
    store = ArtifactStore(str(tmp_path))
    with pytest.raises((StoreError, IndexError)):
        store.path(ArtifactRef(uri, "0" * 64, "x/1"), "a")


@pytest.mark.parametrize("name", ["runs/../../x.json", "../x", "runs/a/b", "/etc/x", "x"])
def test_a_text_beside_the_artifacts_cannot_leave_the_store(tmp_path, name):
    with pytest.raises(StoreError):
        ArtifactStore(str(tmp_path / "store")).write_text(name, "x")


def test_a_file_name_that_leaves_is_refused_before_anything_is_written(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    with store.workspace() as folder:
        (folder / "a").write_text("x")
        with pytest.raises(StoreError, match="plain relative path"):
            store.publish(stage="s", key="k", schema="x/1", files={"../../a": folder / "a"}, algorithm_version=1)
    assert store.storage.find("") == []


def test_a_linked_directory_does_not_lead_writers_out(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "store").mkdir()
    for name in ("blobs", "manifests"):
        (tmp_path / "store" / name).symlink_to(outside)
        with store.workspace() as folder:
            (folder / "a").write_text("x")
            with pytest.raises(StoreError, match="leads out of the store"):
                store.publish(stage="s", key="k", schema="x/1", files={"a": folder / "a"}, algorithm_version=1)
        (tmp_path / "store" / name).unlink()
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["s3://key:sEcReT@bucket/x", "s3://key@bucket", "s3://bucket/x?secret=sEcReT", "sftp://me:sEcReT@host/x"]
)
def test_a_url_with_secrets_is_refused_and_not_repeated(url):
    with pytest.raises(BadStore, match="put keys where the file system looks for them") as caught:
        checked_url(url)
    assert "sEcReT" not in str(caught.value)
    with pytest.raises(BadStore):
        ArtifactStore(url)


@pytest.mark.parametrize("url", ["store", "/data/a@b?c", "s3://bucket/lmq", "memory://x", "file:///data/store"])
def test_other_urls_are_taken(url):
    assert checked_url(url) == url


def test_a_cache_that_others_can_write_in_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    cache = tmp_path / f"lmq-cache-{os.getuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(StoreError, match="can be written by other users"):
        ArtifactStore("memory://x")
    cache.chmod(0o755)
    assert ArtifactStore("memory://x").local_dir.is_relative_to(cache)
