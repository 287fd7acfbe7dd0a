"""Keys, publishing and refusals of stages, with a stage made up for the purpose."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lmq.errors import InputError, LmqError
from lmq_storage import ArtifactStore, StoreError
from lmq_tasks.stage import (
    Job,
    ModelLocation,
    Site,
    Stage,
    as_inputs,
    open_store,
    run_stage,
    shares_under_way,
    stage,
    stage_key,
)

CONFIG = {"text": "hello", "count": 2}


@stage("write", version=1, schema="text/1")
def write(job: Job) -> None:
    (job.output / "text").write_text(job.config["text"] * job.config["count"])
    (job.output / "length").write_text(str(len(job.config["text"])))


@stage("join", version=1, schema="text/1")
def join(job: Job) -> None:
    first = job.input("first", "text").read_text() if job.has("first") else ""
    (job.output / "text").write_text(first + "".join(path.read_text() for path in job.inputs("others", "text")))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store_url=str(tmp_path / "store"))


@pytest.fixture
def store(site: Site) -> ArtifactStore:
    return open_store(site.store_url)


def make(item: Stage, site: Site, config: dict[str, Any] = CONFIG, inputs: Any = None):
    store = open_store(site.store_url)
    return run_stage(item, stage_key(store, item, config, inputs or {}), site, config, inputs or {})


def files_in(site: Site) -> list[Path]:
    return [path for path in Path(site.store_url).rglob("*") if path.is_file()]


def test_a_stage_says_how_far_it_is_while_it_is_made(site: Site) -> None:
    seen = []

    @stage("count", version=1, schema="text/1")
    def count(job: Job) -> None:
        for share in (0.25, 0.5):
            job.advance(share)
            seen.append((shares_under_way("count"), shares_under_way("write")))
        (job.output / "text").write_text("")

    @stage("fail", version=1, schema="text/1")
    def fail(job: Job) -> None:
        raise InputError("no")

    make(count, site)
    with pytest.raises(InputError):
        make(fail, site)
    assert seen == [([0.25], []), ([0.5], [])]
    assert shares_under_way("count") == shares_under_way("fail") == []


def test_a_stage_publishes_what_its_body_writes(site: Site, store: ArtifactStore) -> None:
    ref = make(write, site)
    assert store.path(ref, "text").read_text() == "hellohello"
    manifest = store.manifest("write", ref.key)
    assert manifest is not None
    assert (manifest.schema, manifest.algorithm_version, dict(manifest.config)) == ("text/1", 1, CONFIG)
    assert manifest.seconds is not None
    assert {"torch", "prefect"} <= manifest.versions.keys()


def test_what_is_there_is_not_made_again(site: Site) -> None:
    ref = make(write, site)

    def refuse(job: Job) -> None:
        raise AssertionError("made again")

    assert make(replace(write, body=refuse), site) == ref


def test_inputs_are_read_by_name(site: Site, store: ArtifactStore) -> None:
    a, b = make(write, site, {"text": "a", "count": 1}), make(write, site, {"text": "b", "count": 1})
    joined = make(join, site, {}, as_inputs({"first": a, "others": [b, a]}))
    assert store.path(joined, "text").read_text() == "aba"


# ── keys: one test per component ─────────────────────────────────────────────────────────────────────────


def key(store: ArtifactStore, item: Stage = write, config: dict[str, Any] = CONFIG, inputs: Any = None) -> str:
    return stage_key(store, item, config, inputs or {})


def test_the_key_depends_on_the_stage_name(store: ArtifactStore) -> None:
    assert key(store) != key(store, replace(write, name="other"))


def test_the_key_depends_on_the_algorithm_version(store: ArtifactStore) -> None:
    assert key(store) != key(store, replace(write, version=2))


def test_the_key_depends_on_the_configuration(store: ArtifactStore) -> None:
    assert key(store) != key(store, config={**CONFIG, "count": 3})


def test_the_key_does_not_depend_on_the_order_of_the_configuration(store: ArtifactStore) -> None:
    assert key(store) == key(store, config=dict(reversed(CONFIG.items())))


def test_the_key_does_not_depend_on_the_body_or_schema(store: ArtifactStore) -> None:
    assert key(store) == key(store, replace(write, body=join.body, schema="text/2"))


def test_the_key_depends_on_the_content_of_inputs(site: Site, store: ArtifactStore) -> None:
    a, b = make(write, site), make(write, site, {"text": "b", "count": 1})
    assert key(store, join, {}, as_inputs({"others": [a]})) != key(store, join, {}, as_inputs({"others": [b]}))


def test_the_key_depends_on_the_order_of_a_list_of_inputs(site: Site, store: ArtifactStore) -> None:
    a, b = make(write, site), make(write, site, {"text": "b", "count": 1})
    assert key(store, join, {}, as_inputs({"others": [a, b]})) != key(store, join, {}, as_inputs({"others": [b, a]}))


def test_the_key_does_not_depend_on_how_an_input_was_made(site: Site, store: ArtifactStore) -> None:
    a, same = make(write, site, {"text": "aa", "count": 2}), make(write, site, {"text": "aa", "count": 2, "note": ""})
    assert a.key != same.key
    assert key(store, join, {}, as_inputs({"others": [a]})) == key(store, join, {}, as_inputs({"others": [same]}))


def test_with_a_file_only_its_bytes_enter_the_key(site: Site, store: ArtifactStore) -> None:
    a, longer = make(write, site, {"text": "ab", "count": 1}), make(write, site, {"text": "ab", "count": 2})
    keys = {
        name: [key(store, join, {}, {"first": {"artifact": ref.to_json(), "file": name}}) for ref in (a, longer)]
        for name in ("length", "text")
    }
    assert keys["length"][0] == keys["length"][1]
    assert keys["text"][0] != keys["text"][1]


def test_a_file_that_the_input_lacks_is_named(site: Site, store: ArtifactStore) -> None:
    ref = make(write, site)
    with pytest.raises(LmqError, match=r"artifact write/\w+ has no file 'missing'; run again"):
        key(store, join, {}, {"first": {"artifact": ref.to_json(), "file": "missing"}})


def test_place_threads_and_device_change_no_key(site: Site, tmp_path: Path) -> None:
    elsewhere = Site(
        store_url=str(tmp_path / "elsewhere"),
        model=ModelLocation(kind="directory", place="/models/x"),
        text="/texts/x",
        device="meta",
        threads_per_worker=2,
    )
    assert make(write, site) == make(write, elsewhere)


def test_a_site_travels_as_json(site: Site) -> None:
    full = replace(site, model=ModelLocation(kind="hub", place="a/b@c"), states={"write/x": "ran"})
    assert Site.from_json(full.to_json()) == full
    assert Site.from_json(site.to_json()) == site


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────


def raising(error: Exception) -> Callable[[Job], None]:
    def body(job: Job) -> None:
        (job.output / "half").write_text("half of it")
        raise error

    return body


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_message_and_leaves_nothing(error: Exception, site: Site) -> None:
    with pytest.raises(
        LmqError, match=r"no space left in the store .*store during write; nothing half-written"
    ) as full:
        make(replace(write, body=raising(error)), site)
    assert full.value.exit_code == 1
    assert "lmq store gc" in str(full.value)
    assert files_in(site) == []


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), InputError("bad"), ValueError("a bug")])
def test_other_errors_pass_through_and_leave_nothing(error: Exception, site: Site) -> None:
    with pytest.raises(type(error)) as caught:
        make(replace(write, body=raising(error)), site)
    assert caught.value is error
    assert files_in(site) == []


def test_a_disk_that_fills_while_publishing_leaves_no_artifact(
    site: Site, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(LmqError, match="no space left"):
            make(write, site)
    assert list(store.manifests()) == []
    assert make(write, site).stage == "write"


@pytest.mark.parametrize(
    ("url", "reason"), [("foo://bucket/x", "Protocol not known: foo"), ("s3a+b://x", "Protocol not known")]
)
def test_a_store_that_no_file_system_understands_is_refused(url: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"the store '{url.replace('+', '.')}' cannot be opened \({reason}"):
        open_store(url)


def test_a_file_that_an_artifact_lacks_is_named(site: Site, store: ArtifactStore) -> None:
    ref = make(write, site)
    with pytest.raises(StoreError, match="has no file 'nothing'; it has length, text"):
        store.path(ref, "nothing")
