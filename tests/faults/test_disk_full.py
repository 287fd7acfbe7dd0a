"""A disk that fills up in mid run: one message, nothing half-written, and the run goes on once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lmq_storage import ArtifactStore
from lmq_storage.verify import verify
from tests.flows.processes import content, finished_work, write_config


def test_a_full_disk_ends_the_run_with_a_message_and_loses_nothing(runner, model, whole, tmp_path, note):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        config = write_config(model, tmp_path, "whole", store=str(place / "store"))
        run = runner.run(config)
        filler = place / "filler"
        while not run.is_over and len(finished_work(place / "store")) < 12:
            pass
        free = shutil.disk_usage(place).free
        filler.write_bytes(os.urandom(max(0, free - 64 * 1024)))
        code = run.wait()
        assert code == 1, run.output
        assert "no space left" in run.output.lower(), run.output
        assert "Traceback" not in run.output
        store = ArtifactStore(str(place / "store"))
        there = finished_work(place / "store")
        assert verify(store) == []
        filler.unlink()
        runner.run(config).finish()
        assert {path: path.stat().st_mtime_ns for path in there} == there, "finished work was repeated"
        assert content(tmp_path / "runs" / "whole") == whole["content"]
        assert verify(store) == []
        note(f"full with {len(there)} of {whole['artifacts']} artifacts there; 0 lost, results equal")
    finally:
        subprocess.run(["umount", str(place)], check=True)
