"""Real processes, killed in mid work and started together: nothing finished is lost, nothing wrong is kept.

`tests/faults` does more of this, for longer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from lmq_storage import ArtifactStore
from lmq_storage.housekeeping import collect_garbage
from lmq_storage.verify import verify
from tests.flows.processes import (
    LAYERS,
    content,
    finished_work,
    forking_runner,
    save_small_llama,
    wait_until,
    write_config,
)

pytestmark = pytest.mark.slow

FEW = {"calibration__sequences": 8, "calibration__sequence_length": 64}
"""So that a layer takes tens of milliseconds to measure, as one to quantize does."""


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory) -> Path:
    return save_small_llama(tiny_llama, tmp_path_factory.mktemp("small-llama"), width=128)


@pytest.fixture(scope="module")
def runner(server, tmp_path_factory):
    with forking_runner(PREFECT_API_URL=PREFECT_API_URL.value()) as runner:
        yield runner


@pytest.fixture(scope="module")
def undisturbed(runner, model, tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    runner.run(write_config(model, place, "resume", **FEW)).finish()
    return content(place / "runs" / "resume")


@pytest.mark.parametrize(("stage", "enough"), [("sampled-backward", 2), ("quantize", 4)])
def test_killed_run_goes_on_where_it_was(runner, model, undisturbed, tmp_path, stage, enough):
    config, store = write_config(model, tmp_path, "resume", **FEW), tmp_path / "store"
    run = runner.run(config)
    made = store / "manifests" / stage
    wait_until(lambda: run.is_over or len(list(made.glob("*.json"))) >= enough, "the kill", lambda: run.output)
    assert run.kill(), f"the run was over before it was killed: {run.output}"
    finished = finished_work(store)
    total = 2 * LAYERS if stage == "quantize" else LAYERS
    assert enough <= sum(path.parent.name == stage for path in finished) < total
    assert verify(ArtifactStore(str(store))) == []

    runner.run(config).finish()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was repeated"
    assert content(tmp_path / "runs" / "resume") == undisturbed


def test_two_identical_runs_at_once_on_one_store_while_garbage_is_collected(runner, model, undisturbed, tmp_path):
    """The collector keeps no finished run and nothing for its age: only the leases stand between it and the runs.

    `lmq run` looks at the model before its lease is there, so what it saw may have to be made again: `discover`.
    """
    store = ArtifactStore(str(tmp_path / "store"))
    places = [tmp_path / "one", tmp_path / "two"]
    runs = []
    for place in places:
        place.mkdir()
        runs.append(runner.run(write_config(model, place, "resume", store=str(tmp_path / "store"), **FEW)))

    def both_hold_a_lease() -> bool:
        return len(list((tmp_path / "store" / "leases").glob("*.json"))) == 2

    wait_until(lambda: both_hold_a_lease() or any(run.is_over for run in runs), "both leases")
    collected = 0
    while both_hold_a_lease():
        removed = collect_garbage(store, keep_runs=0, keep_hours=0, dry_run=False)
        if not both_hold_a_lease():
            break  # one run has ended; the other's lease does not hold what only that one needed
        assert {uri.partition("/")[0] for uri in removed.uris} <= {"discover"}, "a run in progress needs it"
        collected += 1
    for run in runs:
        run.finish()
    assert collected > 0
    for place in places:
        assert content(place / "runs" / "resume") == undisturbed
    assert verify(store) == []
    assert not any((tmp_path / "store" / "tmp").iterdir())
    assert not any((tmp_path / "store" / "leases").iterdir())
