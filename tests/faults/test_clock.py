"""A clock that jumps: runs whose clock is a year ahead or behind find what is there, and sweep nothing away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.flows.processes import content, finished_work, forking_runner, write_config


@pytest.mark.parametrize("jump", ["+400d", "-400d"])
def test_a_run_with_another_clock_is_cached_and_equal(server, runner, model, whole, tmp_path, note, jump):
    """libfaketime tells the second run, its plan and the collector another time; the server keeps the true one."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: apt install faketime)")
    config = write_config(model, tmp_path, "whole")
    runner.run(config).finish()
    there = finished_work(tmp_path / "store")
    shutil.rmtree(tmp_path / "runs")
    clock = {"LD_PRELOAD": str(library), "FAKETIME": jump, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with forking_runner(PREFECT_API_URL=server, **clock) as jumped:
        jumped.run(config).finish()
        swept = jumped.start("store", "gc", "--keep-runs", "0", "--store", str(tmp_path / "store"), place=tmp_path)
        assert "removed 0 artifacts" in swept.finish()
    assert {path: path.stat().st_mtime_ns for path in there} == there, "finished work was repeated"
    assert content(tmp_path / "runs" / "whole") == whole["content"]
    note(f"clock {jump}: {len(there)} artifacts found again, none made again or removed")
