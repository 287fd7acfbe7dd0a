"""kill -9 at 20 seeded random moments of a run; then the run goes on to the end."""

from __future__ import annotations

import random
import time

import pytest

from lmq_storage import ArtifactStore
from lmq_storage.housekeeping import collect_garbage
from lmq_storage.verify import verify
from tests.flows.processes import content, finished_work, wait_until, write_config

MOMENTS = 20
SEED = 7


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_run_loses_only_what_was_in_work(runner, model, whole, tmp_path, note, moment):
    """A moment is: so many artifacts are there, and up to 0.3 s have passed."""
    draw = random.Random(SEED + moment)
    enough, pause_s = draw.randrange(whole["artifacts"]), draw.uniform(0, 0.3)
    store = ArtifactStore(str(tmp_path / "store"))
    config = write_config(model, tmp_path, "whole")
    run = runner.run(config)
    wait_until(
        lambda: run.is_over or len(finished_work(tmp_path / "store")) >= enough, "the moment", lambda: run.output
    )
    time.sleep(pause_s)
    in_time = run.kill()
    there = finished_work(tmp_path / "store")
    assert verify(store) == []

    runner.run(config).finish()
    assert {path: path.stat().st_mtime_ns for path in there} == there, "finished work was repeated"
    assert content(tmp_path / "runs" / "whole") == whole["content"]
    assert verify(store) == []
    collect_garbage(store, keep_runs=1, keep_hours=24, dry_run=False)
    assert list((tmp_path / "store" / "tmp").iterdir()) == [], "files of the dead process are left"
    assert list((tmp_path / "store" / "leases").iterdir()) == []
    note(
        f"killed {'with' if in_time else 'after the end, with'} {len(there)} of {whole['artifacts']} artifacts there; "
        "0 of them lost or made again, results equal"
    )
