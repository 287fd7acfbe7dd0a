"""What a report says of how the grids of a variant were tuned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmq_storage import ArtifactRef, ArtifactStore
from lmq_tasks.report_variants import InputsOf, _quantizer
from lmq_tasks.stage import Job, Site, as_inputs


def _kept(store: ArtifactStore, stage: str, kept: bool) -> ArtifactRef:
    with store.workspace() as folder:
        (folder / "kept.json").write_text(json.dumps({"kept": kept}))
        made = {"schema": "tuned/1", "algorithm_version": 1, "config": {}, "inputs": {}, "versions": {}}
        files = {"kept.json": folder / "kept.json"}
        return store.publish(stage=stage, key="a" * 64, files=files, seconds=0, peak_memory_bytes=None, **made)


@pytest.mark.parametrize(
    ("learned", "polished", "expected"),
    [
        (None, None, "fisher-gptq"),
        (True, None, "fisher-gptq, learned"),
        (False, True, "fisher-gptq, polished"),
        (True, True, "fisher-gptq, learned, polished"),
        (False, False, "fisher-gptq"),
    ],
)
def test_what_was_kept_is_named(learned: bool | None, polished: bool | None, expected: str, tmp_path: Path) -> None:
    store, own = ArtifactStore(str(tmp_path)), InputsOf.variant(0)
    given = {"learned": learned, "polished": polished}
    refs = {own.part(name): _kept(store, name, kept) for name, kept in given.items() if kept is not None}
    job = Job(store, Site(store_url=str(tmp_path)), {}, as_inputs(refs), tmp_path)
    assert _quantizer(job, own, {"quantizer": "fisher-gptq"}) == expected
