import json
import os
import subprocess
import sys
import time

import pytest

from lmq_storage import ArtifactStore, housekeeping, leases, processes
from lmq_storage.housekeeping import collect_garbage, list_contents
from lmq_storage.leases import Lease
from lmq_storage.processes import is_alive, process_token
from lmq_storage.verify import verify


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"memory://{tmp_path.name}", cache_dir=tmp_path / "cache")


def publish(store, key, text=None, stage="kurtosis"):
    with store.workspace() as folder:
        (folder / "a").write_text(text or key)
        return store.publish(stage=stage, key=key, schema="x/1", files={"a": folder / "a"}, algorithm_version=1)


def collect(store, **options):
    return collect_garbage(store, **{"keep_runs": 0, "keep_hours": 0, "dry_run": False, **options})


def dead_process():
    """Token of a process that has ended."""
    code = "from lmq_storage.processes import process_token; print(process_token())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_lives_until_it_ends():
    assert is_alive(f"{process_token()}-more") is True
    assert is_alive(dead_process()) is False
    assert is_alive("0123456789ab-1-1") is None
    assert is_alive("anything") is None
    place, pid, start = process_token().split("-")
    assert is_alive(f"{place}-{pid}-{int(start) - 1}") is False, "a later process of the same number is another one"


def test_contents_are_counted_by_run(store):
    both, one, nobody = publish(store, "both", "1234"), publish(store, "one", "123"), publish(store, "nobody", "12345")
    store.write_text("runs/first.json", f"{both.uri}\n{one.uri}\n")
    store.write_text("runs/second.json", f"{both.uri}\nkurtosis/gone\n")
    contents = list_contents(store)
    found = {item.run.name: (item.artifacts, item.total_bytes, item.own_bytes, item.missing) for item in contents.runs}
    assert found == {"first": (2, 7, 3, 0), "second": (1, 4, 0, 1)}
    assert (contents.unneeded_artifacts, contents.unneeded_bytes) == (1, len(nobody.uri.split("/")[1]) - 1)
    assert [(item.stage, item.artifacts, item.total_bytes) for item in contents.stages] == [("kurtosis", 3, 12)]
    assert all(item.age_s < 600 for item in contents.runs)


def test_the_newest_runs_are_kept_and_the_rest_goes(store):
    refs = [publish(store, f"of-{number}") for number in range(3)]
    for number, ref in enumerate(refs):
        store.write_text(f"runs/run-{number}.json", f"{ref.uri}\n")
        time.sleep(0.02)
    assert collect(store, keep_runs=2, dry_run=True).uris == (refs[0].uri,)
    assert store.find(refs[0].stage, refs[0].key) == refs[0]
    garbage = collect(store, keep_runs=2)
    assert (garbage.uris, garbage.freed_bytes) == ((refs[0].uri,), 4)
    assert [store.find(ref.stage, ref.key) for ref in refs] == [None, *refs[1:]]
    assert verify(store) == []


def test_artifacts_of_a_stage_that_is_no_more_are_kept_while_a_run_needs_them_and_go_with_it(store):
    needed, left = (publish(store, key, stage="frobenius") for key in ("needed", "left"))  # now called grids
    store.write_text("runs/before.json", f"{needed.uri}\n")
    assert collect(store, keep_runs=1).uris == (left.uri,)
    assert collect(store).uris == (needed.uri,)
    assert list(store.manifests()) == []


def test_what_is_young_stays(store):
    ref = publish(store, "young")
    assert collect(store, keep_hours=1).uris == ()
    assert collect(store).uris == (ref.uri,)


def test_bytes_shared_with_a_kept_artifact_stay(store):
    kept, gone = publish(store, "kept", "same"), publish(store, "gone", "same")
    store.write_text("runs/demo.json", f"{kept.uri}\n")
    garbage = collect(store, keep_runs=1)
    assert (garbage.uris, garbage.freed_bytes) == ((gone.uri,), 0)
    assert store.path(kept, "a").read_text() == "same"


def test_a_run_in_progress_keeps_what_it_uses_however_old(store):
    old, other = publish(store, "old"), publish(store, "other")
    time.sleep(0.05)  # more than the system's clock for files needs for a step
    with Lease(store, "night") as lease:
        lease.use([old.uri])
        new = publish(store, "new")  # made since the run began, not yet named
        garbage = collect(store)
        assert garbage.uris == (other.uri,)
        assert garbage.kept_for == ("night (in progress)",)
        assert store.find(new.stage, new.key) == new
    assert set(collect(store).uris) == {old.uri, new.uri}


def test_what_was_made_at_the_instant_a_run_began_is_kept(tmp_path):
    """S3 tells times in whole seconds, so the first things a run makes carry the time that it began at."""
    store = ArtifactStore(str(tmp_path / "store"))
    ref = publish(store, "first")
    with Lease(store, "night"):
        (held,) = leases.read_leases(store.storage, store.storage.now())
        for path in (*store.local_dir.glob("blobs/*/*"), *store.local_dir.glob("manifests/*/*")):
            os.utime(path, (held.since, held.since))
        assert collect(store).uris == ()
        assert store.path(ref, "a").read_text() == "first"


def test_bytes_of_what_a_run_needs_are_kept_though_a_listing_leaves_it_out(store, monkeypatch):
    ref = publish(store, "needed")
    store.write_text("runs/demo.json", f"{ref.uri}\n../x\nno-name\n")
    monkeypatch.setattr(ArtifactStore, "manifest_keys", lambda self, stage=None: [])
    collect(store, keep_runs=1)
    assert store.path(ref, "a").read_text() == "needed"


def test_what_a_run_takes_up_while_garbage_is_collected_is_put_back(store, monkeypatch):
    ref = publish(store, "wanted")
    with Lease(store, "night") as lease:
        looks = []

        def look(files, now):
            found = leases.read_leases(files, now)
            looks.append(found)
            if len(looks) == 2:  # after the last look, before the removal
                lease.use([ref.uri])
            return found

        monkeypatch.setattr(housekeeping, "read_leases", look)
        assert collect(store).uris == ()
        assert len(looks) == 3
    assert store.find(ref.stage, ref.key) == ref


def test_a_failed_run_is_known_as_unfinished_until_one_of_its_name_ends_well(store):
    ref = publish(store, "made")

    def fail():
        with Lease(store, "night") as lease:
            lease.use([ref.uri])
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert [item.run.state for item in list_contents(store).runs] == ["unfinished", "unfinished"]
    assert collect(store, keep_runs=1).uris == ()
    with Lease(store, "night") as lease:
        lease.finish([ref.uri])
    assert [item.run.state for item in list_contents(store).runs] == ["finished"]
    assert collect(store, keep_runs=0).uris == (ref.uri,)


def test_the_lease_of_a_killed_process_is_that_of_an_unfinished_run(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    ref = publish(store, "made")
    lease = {"run": "night", "host": "here", "since": None, "ended": False, "uris": [ref.uri]}
    store.write_text(f"leases/night.{dead_process()}-00000000.json", json.dumps(lease))
    assert [item.run.state for item in list_contents(store).runs] == ["unfinished"]
    garbage = collect(store, keep_runs=0)
    assert (garbage.uris, garbage.leftovers) == ((ref.uri,), 1)
    assert list_contents(store).runs == ()


def test_another_machines_lease_counts_while_it_is_renewed(store, monkeypatch):
    ref = publish(store, "theirs")
    lease = {"run": "night", "host": "there", "since": None, "ended": False, "uris": [ref.uri]}
    store.write_text("leases/night.0123456789ab-1-1-00000000.json", json.dumps(lease))
    assert [item.run.state for item in list_contents(store).runs] == ["in progress"]
    assert collect(store).uris == ()
    monkeypatch.setattr(processes, "SILENT_AFTER_S", -1e9)
    assert collect(store).uris == (ref.uri,)


def test_a_lease_is_renewed_in_the_background(store, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with Lease(store, "night") as lease:
        lease.use(["kurtosis/made"], at_once=False)
        deadline = time.monotonic() + 60
        while not list_contents(store).runs[0].run.uris:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"run": "../x", "host": "h", "since": 0, "ended": false, "uris": []}']
)
def test_an_unreadable_lease_is_passed_over(store, text):
    store.write_text("leases/night.x.json", text)
    assert list_contents(store).runs == ()


def test_the_clock_of_this_machine_plays_no_part(tmp_path, monkeypatch):
    """The collector asks the storage what time it is."""
    store = ArtifactStore(str(tmp_path / "store"))
    publish(store, "young")
    now = time.time()
    for jump in (-10 * 86400, 10 * 86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert collect(store, keep_hours=1).uris == ()
        with Lease(store, "night"):
            assert [item.run.state for item in list_contents(store).runs] == ["in progress"]


def test_files_of_dead_processes_and_copies_of_what_is_gone_are_removed(store):
    kept, gone = publish(store, "kept"), publish(store, "gone")
    store.write_text("runs/demo.json", f"{kept.uri}\n")
    for ref in (kept, gone):
        store.directory(ref)
    tmp = store.local_dir / "tmp"
    abandoned = tmp / f"{dead_process()}-x"
    abandoned.mkdir()
    (abandoned / "half").write_text("half")
    (tmp / f"{process_token()}-y").write_text("in work")
    garbage = collect(store, keep_runs=1)
    assert garbage.leftovers >= 2
    assert [path.name for path in tmp.iterdir()] == [f"{process_token()}-y"]
    assert [path.name for path in store.laid_out.iterdir()] == [kept.sha256[:32]]
    assert store.path(kept, "a").read_text() == "kept"


def test_what_a_run_in_progress_laid_out_is_kept_though_its_artifact_was_not_seen(store):
    """The collector reads manifests first and directories later: what was published in between is of no manifest."""
    old, again, new = publish(store, "old"), publish(store, "again"), publish(store, "new")
    directories = {ref.key: store.directory(ref) for ref in (old, again)}
    for directory in directories.values():
        os.utime(directory, (0, 0))
    with Lease(store, "night"):
        directories["new"] = store.directory(new)
        assert store.directory(again) == directories["again"]
        for ref in (old, again, new):
            store.storage.remove(f"manifests/{ref.uri}.json")
        collect(store)
        assert {key for key, directory in directories.items() if directory.exists()} == {"again", "new"}
    collect(store)
    assert not any(directory.exists() for directory in directories.values())


_LAY_OUT = """
import sys
from lmq_storage import ArtifactStore
store = ArtifactStore(sys.argv[1])
sys.stdin.readline()
for number in range(200):
    assert (store.directory(store.find("kurtosis", f"{number:03}")) / "a").read_text() == f"{number:03}"
"""


def test_processes_that_lay_out_the_same_directories_do_not_disturb_each_other(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    for number in range(200):
        publish(store, f"{number:03}")
    command = [sys.executable, "-c", _LAY_OUT, store.url]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        reader.stdin.write("go\n")
        reader.stdin.flush()
    assert [reader.communicate()[1] for reader in readers] == ["", "", ""]
    assert len(list(store.laid_out.iterdir())) == 200


def test_a_link_does_not_lead_the_collector_out_of_the_store(tmp_path):
    """Neither a folder of bytes nor a name in one may stand for something elsewhere."""
    store = ArtifactStore(str(tmp_path / "store"))
    publish(store, "one")
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / ("ab" + "0" * 62)
    precious.write_text("precious")
    (tmp_path / "store" / "blobs" / "ab").symlink_to(outside)
    (tmp_path / "store" / "tmp" / f"{dead_process()}-x").symlink_to(outside)
    assert collect(store).leftovers == 1
    assert not any((tmp_path / "store" / "tmp").iterdir())
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[:40], "has a damaged manifest"),
        (lambda text: text.replace('"manifest_version": 1', '"manifest_version": 2'), "manifest version 2"),
        (lambda text: text.replace('"manifest_version": 1', '"manifest_version": "0"'), "manifest version 0"),
        (lambda text: text.replace('"key": "k"', '"key": "other"'), "manifest of kurtosis/other"),
        (lambda text: text.replace('"a": {', '"../../a": {'), "must be a plain relative path"),
        (lambda text: text.replace('"sha256": "', '"sha256": "../'), "not a digest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_a_miss_and_is_named(store, change, complaint):
    publish(store, "k")
    text = store.storage.read("manifests/kurtosis/k.json").decode()
    assert change(text) != text
    store.storage.write("manifests/kurtosis/k.json", change(text).encode())
    assert store.find("kurtosis", "k") is None
    (line,) = verify(store)
    assert line.startswith("kurtosis/k ")
    assert complaint in line
    again = publish(store, "k")
    assert store.path(again, "a").read_text() == "k"
    assert verify(store) == []
