"""Prefect's notes of finished tasks are read only when they are what our tasks write: no pickle, no code."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer

from lmq_flows.graph.records import ArtifactRecords, is_plain_record

REF = {"uri": "kurtosis/k", "sha256": "0" * 64, "schema": "x/1"}


class Dangerous:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def record(result: str, **serializer) -> bytes:
    plain = JSONSerializer().model_dump(mode="json")
    metadata = {"storage_key": "key", "serializer": {**plain, **serializer}, "expiration": None}
    return json.dumps({"metadata": metadata, "result": result}).encode()


def pickled(path: Path) -> bytes:
    from prefect.serializers import PickleSerializer

    serializer = PickleSerializer(picklelib="pickle")
    text = serializer.dumps(Dangerous(path)).decode()
    metadata = {"storage_key": "key", "serializer": serializer.model_dump(mode="json"), "expiration": None}
    return json.dumps({"metadata": metadata, "result": text}).encode()


def test_a_planted_pickle_is_not_read(tmp_path):
    """Prefect alone would run it, which the first half shows."""
    harm = tmp_path / "harm"
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "key").write_bytes(pickled(harm))
    ResultStore(result_storage=LocalFileSystem(basepath=tmp_path / "records")).exists("key")
    assert harm.exists()
    harm.unlink()
    guarded = ResultStore(result_storage=ArtifactRecords(store_url=str(tmp_path)))
    assert guarded.exists("key") is False
    assert not harm.exists()


def test_our_own_records_are_read(tmp_path):
    store = ResultStore(result_storage=ArtifactRecords(store_url=str(tmp_path)), serializer=JSONSerializer())
    store.write(REF, key="stage-0123")
    assert store.exists("stage-0123") is True
    again = ResultStore(result_storage=ArtifactRecords(store_url=str(tmp_path)))
    assert again.read("stage-0123").result == REF
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["stage-0123"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("key", ["../key", "/etc/passwd", "a/b"])
def test_a_key_cannot_leave_the_store(tmp_path, key):
    assert ResultStore(result_storage=ArtifactRecords(store_url=str(tmp_path / "store"))).exists(key) is False


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        base64.b64encode(b"x"),
        record(json.dumps(REF), type="pickle"),
        record(json.dumps(REF), type="compressed/json"),
        record(json.dumps(REF), jsonlib="pickle"),
        record(json.dumps(REF), object_decoder="os.system"),
        record(json.dumps(REF), loads_kwargs={"cls": "x"}),
        record(json.dumps({**REF, "__class__": "subprocess.Popen"})),
        record(json.dumps({**REF, "uri": {"__class__": "subprocess.Popen", "data": {}}})),
        record(json.dumps({**REF, "uri": "../../x"})),
        record(json.dumps(REF)[:-1] + ', "uri": {"__class__": "x"}}'),
        record("[]"),
    ],
)
def test_anything_but_a_reference_in_plain_json_is_refused(content):
    assert is_plain_record(record(json.dumps(REF)))
    assert not is_plain_record(content)
